"""Weights that later loads map: equal, not copied, made anew after a change, never written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import models, tl, transforms, trees
from layercomb.interop import gguf, huggingface, safetensors, weight_cache
from layercomb.interop.gguf.blocks import BLOCKS
from layercomb.interop.gguf.weights import _integers
from layercomb.interop.kept import entries, sources
from layercomb.layers.quantized import panels
from layercomb.supervised import Loop, TrainTask
from layercomb.transforms import buffers
from layercomb.transforms.quantization.holding import Kind
from tests.interop.tiny import PRETRAINED

SIZES = {'vocab_size': 96, 'd_model': 64, 'd_ff': 96, 'n_layers': 3, 'n_heads': 4, 'max_len': 64}


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    net = models.Llama(**SIZES, n_kv_heads=2, tied=True)
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    path = tmp_path_factory.mktemp('files') / 'tiny.gguf'
    gguf.save(path, lc.Model(net, weights), dtype='q8_0')
    return path


@pytest.fixture
def file(original, tmp_path):
    return Path(shutil.copy(original, tmp_path / 'tiny.gguf'))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def made(monkeypatch):
    """How often weights were written into the cache, and not only mapped."""
    written, write = [], weight_cache._write
    monkeypatch.setattr(weight_cache, '_write', lambda *a: written.append(1) or write(*a))
    return written


def entry_in(cache):
    (entry,) = cache.iterdir()
    return entry


def kept(cache, source, weights, options=(), model=None):
    """Weights by way of the cache, as of a source that is read now."""
    seen = weight_cache.look(cache, source)
    return weight_cache.weights_of(cache, seen, dict(options), model, lambda: dict(weights))


def mappings(path):
    """The first and last address of each mapping of a file in this process."""
    lines = Path('/proc/self/maps').read_text().splitlines()
    ranges = (line.split()[0].split('-') for line in lines if line.endswith(str(path)))
    return [(int(first, 16), int(end, 16)) for first, end in ranges]


def is_mapped(x, path):
    first = x.unsafe_buffer_pointer()
    return any(a <= first and first + x.nbytes <= b for a, b in mappings(path))


def same(one, other):
    one, other = trees.flatten(one), trees.flatten(other)
    assert one.keys() == other.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(other[path]), strict=True)


def test_the_first_and_the_second_load_map_the_same_numbers(file, cache, made):
    plain, _ = gguf.load(file)
    assert not cache.exists()
    for _ in range(2):
        model, _ = gguf.load(file, cache=cache)
        assert model.layer == plain.layer
        same(model.weights, plain.weights)
        if sys.platform == 'linux':
            entry = entry_in(cache)
            assert all(is_mapped(x, entry) for x in trees.flatten(model.weights).values())
    assert made == [1]
    ids = jnp.arange(8)[None] + 5
    np.testing.assert_array_equal(model(ids), plain(ids))


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells what is mapped')
@pytest.mark.parametrize('free', [1 << 40, 1000])
def test_what_would_be_read_slowly_is_copied_if_there_is_room(file, cache, free, monkeypatch):
    wanted, _ = gguf.load(file, cache=cache)
    monkeypatch.setattr(buffers, 'is_quick', lambda data: False)
    monkeypatch.setattr(weight_cache, 'free_bytes', lambda: free)
    model, _ = gguf.load(file, cache=cache)
    same(model.weights, wanted.weights)
    entry = entry_in(cache)
    for x in trees.flatten(model.weights).values():
        assert is_mapped(x, entry) == (free == 1000)


def test_an_entry_that_is_removed_is_used_on(file, cache):
    wanted, _ = gguf.load(file)
    model, _ = gguf.load(file, cache=cache)
    shutil.rmtree(cache)
    same(model.weights, wanted.weights)


def test_wide_weights_are_not_kept(file, cache):
    gguf.load(file, dtype='float32', cache=cache)
    assert not cache.exists()


def changed_file(file, entry, monkeypatch):
    os.utime(file, ns=(1, 1))


def another_file_of_the_same_size_and_time(file, entry, monkeypatch):
    told, other = file.stat(), file.with_name('other')
    shutil.copy(file, other)
    os.replace(other, file)
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert file.stat().st_mtime_ns == told.st_mtime_ns


def another_version(file, entry, monkeypatch):
    monkeypatch.setattr(weight_cache, '__version__', '99')


def another_layout(file, entry, monkeypatch):
    monkeypatch.setattr(weight_cache, 'LAYOUT', 99)


def another_owner(file, entry, monkeypatch):
    own = entry.stat().st_ino
    is_own = entries.is_own
    monkeypatch.setattr(entries, 'is_own', lambda path: is_own(path) and path.stat().st_ino != own)


def cut_off(file, entry, monkeypatch):
    os.truncate(entry, entry.stat().st_size - 1)


def cut_off_in_the_header(file, entry, monkeypatch):
    os.truncate(entry, 60)


def empty(file, entry, monkeypatch):
    os.truncate(entry, 0)


def longer(file, entry, monkeypatch):
    with entry.open('ab') as opened:
        opened.write(bytes(64))


def flipped(at):
    def flip(file, entry, monkeypatch):
        # In its own memory, as what is mapped elsewhere must not change.
        data = bytearray(entry.read_bytes())
        data[at % len(data)] ^= 1
        entry.unlink()
        entry.write_bytes(data)

    return flip


def nothing_but_noise(file, entry, monkeypatch):
    entry.unlink()
    entry.write_bytes(np.random.default_rng(0).bytes(5000))


@pytest.mark.parametrize(
    'change',
    [
        changed_file, another_file_of_the_same_size_and_time, another_version, another_layout,
        another_owner, cut_off, cut_off_in_the_header, empty, longer, nothing_but_noise,
        *(flipped(at) for at in (0, 9, 15, 20, 70, 300, 5000, -1)),
    ],
)  # fmt: skip
def test_what_is_stale_or_damaged_is_made_anew(change, file, cache, made, monkeypatch):
    wanted, _ = gguf.load(file)
    gguf.load(file, cache=cache)
    change(file, entry_in(cache), monkeypatch)
    for _ in range(2):
        model, _ = gguf.load(file, cache=cache)
        same(model.weights, wanted.weights)
    assert made == [1, 1] and len(list(cache.iterdir())) == 1


def replaced_after(monkeypatch, module, name, file, other):
    """Puts another file in the place of a file when a function has read what it reads."""
    function = getattr(module, name)

    def swapping(*given):
        read = function(*given)
        if other.exists():
            os.replace(other, file)
        return read

    monkeypatch.setattr(module, name, swapping)


def test_a_gguf_file_that_is_replaced_between_its_parts_is_not_kept(file, cache, monkeypatch):
    plain, _ = gguf.load(file)
    other = file.with_name('other.gguf')
    halves = jax.tree.map(lambda x: x * 0.5, gguf.load(file, dtype='float32')[0].weights)
    gguf.save(other, lc.Model(gguf.load(file, dtype='float32')[0].layer, halves), dtype='q8_0')
    wanted, _ = gguf.load(other)
    replaced_after(monkeypatch, gguf.loading, 'config_of_file', file, other)
    model, _ = gguf.load(file, cache=cache)
    same(model.weights, plain.weights)
    assert not cache.exists() and not other.exists()
    for _ in range(2):
        same(gguf.load(file, cache=cache)[0].weights, wanted.weights)


def test_a_directory_that_changes_between_its_parts_is_not_kept(directory, cache, monkeypatch):
    file = directory / 'model.safetensors'
    other = shutil.copy(file, directory / 'other')
    replaced_after(monkeypatch, huggingface.loading, 'tensors_in', file, Path(other))
    plain, _ = huggingface.load(directory, dtype='bfloat16')
    shutil.copy(file, other)
    same(huggingface.load(directory, dtype='bfloat16', cache=cache)[0].weights, plain.weights)
    assert not cache.exists()


@pytest.mark.parametrize('at', [0, 65_535, 65_536, -1])
def test_a_digest_tells_files_apart_that_are_alike_otherwise(tmp_path, at, monkeypatch):
    data = bytearray(300_000)
    (tmp_path / 'source').write_bytes(data)
    told = (tmp_path / 'source').stat()
    monkeypatch.setattr(sources.os, 'fstat', lambda descriptor: told)
    seen = sources.look(tmp_path / 'source')
    assert seen.is_unchanged()
    data[at] = 1
    (tmp_path / 'source').write_bytes(data)
    assert not seen.is_unchanged()


@pytest.mark.parametrize('options', [{'a': (1, 2)}, {'a': float('nan')}, {1: None}])
def test_options_that_json_writes_otherwise_are_found_again(options, cache, tmp_path, made):
    source = tmp_path / 'source'
    source.touch()
    for _ in range(2):
        kept(cache, source, {'x': jnp.ones(3)}, options, options)
    assert made == [1]


def test_an_entry_of_another_model_or_of_other_options_is_not_used(cache, tmp_path, made):
    source = tmp_path / 'source'
    source.touch()
    for i, (options, n) in enumerate([({}, 3), ({}, 4), ({'group_size': 32}, 4)]):
        like = weight_cache.described({'a': {'b': jax.ShapeDtypeStruct((n, 2), 'int8')}})
        assert like == {'a/b': ['int8', n, 2]}
        for _ in range(2):
            found = kept(cache, source, {'a/b': jnp.ones((n, 2), 'int8')}, options, like)
            assert found['a/b'].shape == (n, 2)
        assert len(made) == i + 1
    assert len(list(cache.iterdir())) == 2


def test_off_a_cpu_weights_are_there_once(cache, tmp_path, made, monkeypatch):
    source = tmp_path / 'source'
    source.touch()
    weights = {'x': jnp.arange(5)}
    monkeypatch.setattr(weight_cache, 'is_cpu', lambda: False)
    monkeypatch.setattr(weight_cache, 'free_bytes', lambda: pytest.fail('that of the device'))
    first = kept(cache, source, weights)
    assert first['x'] is weights['x'] and made == [1]
    np.testing.assert_array_equal(kept(cache, source, weights)['x'], weights['x'], strict=True)
    assert made == [1]


def test_a_file_that_changes_while_it_is_read_is_not_kept(cache, tmp_path):
    source = tmp_path / 'source'
    source.write_text('before')

    def make():
        source.write_text('afterwards')
        return {'x': jnp.ones(3)}

    seen = weight_cache.look(cache, source)
    assert weight_cache.weights_of(cache, seen, {}, None, make)['x'].shape == (3,)
    assert not cache.exists()


def test_a_file_that_vanishes_while_it_is_read_is_no_error(cache, tmp_path):
    source = tmp_path / 'source'
    source.touch()
    seen = weight_cache.look(cache, source)

    def make():
        source.unlink()
        return {'x': jnp.ones(3)}

    assert weight_cache.weights_of(cache, seen, {}, None, make)['x'].shape == (3,)
    assert weight_cache.look(cache, source) is None
    assert kept(cache, source, {'x': jnp.ones(4)})['x'].shape == (4,)
    assert not cache.exists()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int8', 'uint8', 'uint32'])
def test_arrays_of_any_size_lie_at_multiples_of_64_bytes(dtype, cache, tmp_path):
    source = tmp_path / 'source'
    source.touch()
    shapes = [(), (0,), (1,), (3, 5), (7,), (2, 3, 4), (16, 4), (65,)]
    weights = {
        f'a/{i}': jnp.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        for i, shape in enumerate(shapes)
    }
    found = kept(cache, source, weights)
    same(trees.unflatten(found), trees.unflatten(weights))
    for x in found.values():
        assert not x.size or x.unsafe_buffer_pointer() % buffers.ALIGNMENT == 0


def test_a_donated_weight_is_copied_and_its_file_stays(file, cache):
    wanted, _ = gguf.load(file)
    model, _ = gguf.load(file, cache=cache)
    before = entry_in(cache).read_bytes()
    step = jax.jit(lambda w: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), w), donate_argnums=0)
    more = trees.flatten(step(model.weights))
    for path, x in trees.flatten(wanted.weights).items():
        np.testing.assert_array_equal(more[path], x + jnp.ones((), x.dtype))
    assert entry_in(cache).read_bytes() == before
    again, _ = gguf.load(file, cache=cache)
    same(again.weights, wanted.weights)


@pytest.fixture
def directory(tmp_path):
    net = models.GPT2(vocab_size=96, d_model=64, d_ff=96, n_layers=2, n_heads=4, max_len=64)
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    huggingface.save(tmp_path / 'model', lc.Model(net, weights))
    return tmp_path / 'model'


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells what is mapped')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_file_of_the_user_is_mapped(directory, cache, dtype):
    path = directory / 'model.safetensors'
    model, _ = huggingface.load(directory, dtype=dtype, cache=cache)
    wanted = {k: np.array(x) for k, x in trees.flatten(model.weights).items()}
    assert cache.exists() == (dtype == 'bfloat16') and not mappings(path)
    with path.open('r+b') as opened:
        opened.write(bytes(path.stat().st_size))
    os.truncate(path, 100)
    same(trees.flatten(model.weights), wanted)


def test_a_file_may_be_replaced_by_its_own_weights(directory, cache):
    model, _ = huggingface.load(directory, dtype='bfloat16', cache=cache)
    wanted = {k: np.array(x) for k, x in trees.flatten(model.weights).items()}
    safetensors.save_weights(directory / 'model.safetensors', model.weights)
    same(trees.flatten(model.weights), wanted)
    assert sorted(x.name for x in directory.iterdir()) == ['config.json', 'model.safetensors']


def trained(net, weights, trainable=None):
    """The weights after some steps, which donate what trains."""
    ids = np.random.default_rng(0).integers(0, 96, (2, 9)).astype(np.int32)
    batch = ids[:, :-1], ids[:, 1:], np.ones((2, 8), np.float32)
    task = TrainTask([batch] * 3, tl.CrossEntropyLoss(), optax.sgd(0.1), trainable=trainable)
    loop = Loop(lc.Model(net, weights), task, eval_every=None, progress=False)
    loop.run(3)
    return loop.weights


def test_training_starts_from_mapped_weights_and_leaves_their_entry_alone(directory, cache):
    plain, _ = huggingface.load(directory)
    flat = trees.flatten(plain.weights)
    weights = trees.unflatten(kept(cache, directory, dict(flat)))
    before = entry_in(cache).read_bytes()
    if sys.platform == 'linux':
        assert all(is_mapped(x, entry_in(cache)) for x in trees.flatten(weights).values())
    made = trained(plain.layer, weights)
    same(made, trained(plain.layer, plain.weights))
    assert not np.array_equal(made['embedding']['table'], plain.weights['embedding']['table'])
    same(weights, plain.weights)
    assert entry_in(cache).read_bytes() == before


def test_adapters_train_over_mapped_weights(file, cache):
    plain, _ = gguf.load(file)
    wanted = trained(*transforms.lora(plain.layer, plain.weights, rank=2), transforms.is_lora)
    for _ in range(2):
        model, _ = gguf.load(file, cache=cache)
        net, weights = transforms.lora(model.layer, model.weights, rank=2)
        same(trained(net, weights, transforms.is_lora), wanted)


def test_weights_in_bfloat16_are_kept(cache, made):
    plain, _ = huggingface.load(PRETRAINED / 'gpt2', dtype='bfloat16')
    for _ in range(2):
        model, _ = huggingface.load(PRETRAINED / 'gpt2', dtype='bfloat16', cache=cache)
        assert model.layer == plain.layer
        same(model.weights, plain.weights)
    assert made == [1]


PROGRAM = """
import sys
import numpy as np
from layercomb import trees
from layercomb.interop import gguf
model, _ = gguf.load(sys.argv[1], cache=sys.argv[2])
print(sum(float(np.asarray(x, np.float64).sum()) for x in trees.flatten(model.weights).values()))
"""


def test_two_processes_at_once_do_no_harm(file, cache):
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-W', 'error', '-c', PROGRAM, str(file), str(cache)]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [each.communicate()[0] for each in both]
    assert [each.returncode for each in both] == [0, 0] and said[0] == said[1]
    assert entry_in(cache).suffix == '.weights'


def checksum(x):
    """A sum that tells where each byte is; of scales in float32, of four digits."""
    x = np.asarray(x)
    x = np.round(x * 1e4).astype(np.int32) if x.dtype == np.float32 else x
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8).astype(np.uint64)
    return int((data * np.arange(1, data.size + 1, dtype=np.uint64)).sum() % 2**32)


def of_blocks(name, kind):
    """Values and scales of blocks with every byte but for their float16 numbers."""
    blocks = next(x for x in BLOCKS.values() if x.name.lower() == name)
    data = (np.arange(16 * 2 * blocks.n_bytes) * 7919 % 251).astype(np.uint8)
    data = data.reshape(16, 2, blocks.n_bytes)
    data[..., : 4 if blocks.minima else 2] = [1, 44, 2, 40][: 4 if blocks.minima else 2]
    return _integers(blocks, data.reshape(16, -1), kind)


def test_the_layout_is_that_of_its_number():
    """If this fails, what is kept has changed: raise `panels.LAYOUT`, and put the sums here."""
    values = np.arange(32 * 64, dtype=np.int64).reshape(32, 64) * 7919 % 251 - 125
    scales = np.arange(32 * 2, dtype=np.float32).reshape(32, 2)
    words, interleaved = panels.of_rows(values.astype(np.int8), scales, 1)
    packed, _ = panels.of_rows(values.astype(np.uint8), scales, 1)
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((32, 64)), jnp.float32)
    rounded = [
        x
        for bits in (8, 4)
        for x in trees.flatten(
            transforms.quantize(tl.Dense(64), {'kernel': kernel}, bits, 32, smallest=1)[1]
        ).values()
    ]
    read = [
        x
        for name, kind in (('q8_0', Kind(8, 32)), ('q4_1', Kind(4, 32, True, True)))
        for x in of_blocks(name, kind)
    ]
    every = [words, packed, interleaved, *rounded, *read]
    of_panels = [268433987, 267954255, 2073947]
    of_rounding = [265462962, 1411772, 68952073, 15116076]
    of_files = [65862112, 233920, 16996464, 180672]
    sums = [checksum(x) for x in every]
    assert (panels.LAYOUT, sums) == (1, [*of_panels, *of_rounding, *of_files])
