"""A process with eight CPU devices, in which tests of several devices run."""

from __future__ import annotations

import os

N_DEVICES = 8


def begin():
    """Makes the devices, before JAX is used."""
    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax

    jax.config.update('jax_num_cpu_devices', N_DEVICES)
    jax.config.update('jax_numpy_dtype_promotion', 'strict')
    jax.config.update('jax_debug_key_reuse', True)


def optimizing(function, *args):
    """Calls a function with programs compiled as users' are."""
    import jax

    jax.config.update('jax_disable_most_optimizations', False)
    return function(*args)


def quick(function, *args):
    """Calls a function with programs that are compiled fast."""
    import jax

    jax.config.update('jax_disable_most_optimizations', True)
    return function(*args)
