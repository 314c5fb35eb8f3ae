"""Memory that JAX takes without a copy, and slices of it that stay right."""

from __future__ import annotations

import mmap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, trees
from layercomb.transforms import buffers


def stack() -> jax.Array:
    return jax.jit(lambda: jnp.arange(3 * 16 * 16, dtype=jnp.float32).reshape(3, 16, 16))()


def address(x: jax.Array) -> int:
    return x.unsafe_buffer_pointer()


@pytest.mark.parametrize('dtype', ['float32', 'uint32', 'float16', 'int8', ml_dtypes.bfloat16])
@pytest.mark.parametrize('shape', [(), (0, 3), (5,), (33, 7)])
def test_filled_memory_becomes_an_array_of_the_same_numbers(shape, dtype):
    made = buffers.empty(shape, dtype)
    made[...] = 3
    taken = buffers.taken(made)
    assert taken.shape == shape and taken.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(taken), made)


def test_nothing_is_copied_on_a_cpu():
    made = buffers.empty((64, 64), 'float32')
    made[...] = 1
    assert address(buffers.taken(made)) == made.ctypes.data
    whole = stack()
    assert address(buffers.shared_slice(whole, 2)) == address(whole) + 2 * 16 * 16 * 4


def test_a_slice_at_an_odd_place_is_right_too():
    whole = jnp.arange(15, dtype=jnp.float32).reshape(5, 3)
    for i in range(5):
        np.testing.assert_array_equal(buffers.shared_slice(whole, i), np.asarray(whole)[i])


def test_a_slice_survives_the_whole_and_the_whole_a_donated_slice():
    wanted, add = np.asarray(stack()).copy(), jax.jit(lambda x: x + 1, donate_argnums=0)
    whole = stack()
    np.testing.assert_array_equal(add(buffers.shared_slice(whole, 1)), wanted[1] + 1)
    np.testing.assert_array_equal(whole, wanted)
    kept, other = (buffers.shared_slice(whole, i) for i in (0, 2))
    np.testing.assert_array_equal(add(whole), wanted + 1)
    np.testing.assert_array_equal(kept, wanted[0])
    del whole
    jax.block_until_ready([stack() + i for i in range(8)])  # would take freed memory
    np.testing.assert_array_equal(other, wanted[2])


def test_what_cannot_share_its_memory():
    assert buffers.is_shareable(stack())
    keys = jax.random.split(jax.random.key(0), 3)
    gone = stack()
    gone.delete()
    for x in (np.zeros((2, 3)), 1, jax.ShapeDtypeStruct((2,), 'float32'), keys, gone):
        assert not buffers.is_shareable(x)
    seen = []
    jax.make_jaxpr(lambda x: seen.append(buffers.is_shareable(x)) or x)(stack())
    assert seen == [False]


def test_unstacked_weights_are_in_the_memory_of_the_stack():
    net = tl.Repeat(tl.Dense(64), 3)
    weights, _ = net.init((lc.shape_dtype((1, 64)),), jax.random.key(0))
    _, apart = lc.unstack(net, weights)
    flat, whole = trees.flatten(apart), trees.flatten(weights)['kernel']
    assert [address(flat[f'{i}/kernel']) - address(whole) for i in range(3)] == [0, 16384, 32768]
    for i in range(3):
        np.testing.assert_array_equal(flat[f'{i}/kernel'], whole[i])


def test_slices_stay_on_the_device_that_the_whole_was_put_on():
    whole = jax.device_put(stack(), jax.devices()[0])
    assert buffers.shared_slice(whole, 0).committed
    assert not buffers.shared_slice(stack(), 0).committed


@pytest.mark.parametrize('kib', [0, 4096, 12288, 16384])
def test_an_array_is_read_quickly_in_large_pages(kib, tmp_path, monkeypatch):
    (tmp_path / 'file').write_bytes(bytes(1 << 24))
    data = buffers.mapped(tmp_path / 'file')
    assert not data.flags.writeable and data.ctypes.data % mmap.PAGESIZE == 0
    first = data.ctypes.data
    others = 'Rss: 900 kB\nFilePmdMapped:     {} kB\n'
    (tmp_path / 'smaps').write_text(
        f'{first - 4096:x}-{first:x} r--p 00000000 fe:00 17 /another\n{others.format(0)}'
        f'{first:x}-{first + (1 << 24):x} r--s 00000000 fe:00 18 /the file\n'
        f'Size:  16384 kB\nRss:   16384 kB\nFilePmdMapped:   {kib} kB\nVmFlags: rd mr\n'
        f'{first + (1 << 24):x}-{first + (1 << 25):x} rw-p 00000000 00:00 0\n{others.format(900)}'
    )
    monkeypatch.setattr(buffers, '_MAPPINGS', tmp_path / 'smaps')
    monkeypatch.setattr(buffers, '_HUGE', tmp_path / 'huge')
    (tmp_path / 'huge').write_text('always [madvise] never')
    assert buffers.is_quick(data) == (kib >= 8192) and buffers.is_quick(data[:-1])
    (tmp_path / 'huge').write_text('always madvise [never]')
    assert buffers.is_quick(data)
    (tmp_path / 'huge').unlink()
    assert buffers.is_quick(data)
