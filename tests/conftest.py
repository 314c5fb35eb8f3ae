"""Strict settings for every test: dtypes never promoted by accident, keys never used twice."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture
def key():
    """A typed key."""
    return jax.random.key(0)


@pytest.fixture(autouse=True, scope='module')
def _drop_compiled_programs():
    """Compiled programs of one file are of no use to the next, and take memory."""
    yield
    jax.clear_caches()
