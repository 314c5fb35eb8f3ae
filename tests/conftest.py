"""Strict settings for every test: dtypes never promoted by accident, keys never used twice."""

import gc
import importlib.metadata
import os
import time
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What the launcher keeps in a person's cache folder, tests would find again: each asks for it.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
# These emitters take half of the suite's time to compile. A jaxlib that did not know the flag would
# refuse to start, so it is given to the one that was tried.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'.strip()

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_debug_key_reuse', True)
# Tests compile far more than they compute. What is about compiled programs asks for `optimized`,
# and .ci/nightly for all that computes.
if 'JAX_DISABLE_MOST_OPTIMIZATIONS' not in os.environ:
    jax.config.update('jax_disable_most_optimizations', True)


_MAPS = Path('/proc/self/maps')


@pytest.fixture(scope='module', autouse=True)
def _few_programs():
    """Forgets compiled programs when there are many, between two files of tests.

    A program on a CPU is in several mappings of memory, and Linux gives a process 65,530: one more,
    and it dies.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > 16_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    """A typed key."""
    return jax.random.key(0)


@pytest.fixture
def optimized():
    """Compiles as users' programs are compiled: for tests of memory, FLOPs and programs."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


class Forced:
    """Engines of which a test says what they make: all that exist while the test runs."""

    def __init__(self, monkeypatch):
        from layercomb.serving.batching.scheduler import Row

        self._add = Row.add
        self._set = lambda add: monkeypatch.setattr(Row, 'add', add)

    def making(self, *rows):
        """They make just these tokens, a list for each choice."""

        def add(row, token, scores):
            given = rows[row.index % len(rows)]
            self._add(row, int(given[len(row.made) % len(given)]), scores)

        self._set(add)

    def failing(self, error, after=0):
        """They raise an error after some tokens."""

        def add(row, token, scores):
            if len(row.made) == after:
                raise error
            self._add(row, 97, scores)

        self._set(add)

    def slow(self, heard=lambda: None, until=lambda: False):
        """They take 20 ms for a token, and find no end; `heard` is called at each one."""

        def add(row, token, scores):
            heard()
            time.sleep(0 if until() else 0.02)
            self._add(row, 97, scores)

        self._set(add)


@pytest.fixture
def forced(monkeypatch):
    """What makes engines make what a test says, see `Forced`."""
    return Forced(monkeypatch)
