"""Strict settings for every test: dtypes never promoted by accident, keys never used twice."""

import importlib.metadata
import os

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
