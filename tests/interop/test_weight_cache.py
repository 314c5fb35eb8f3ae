"""Weights that later loads map: equal, not copied, made anew after a change, never written to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import models, tl, transforms, trees
from layercomb.errors import UsageWarning
from layercomb.interop import gguf, huggingface, safetensors, weight_cache
from layercomb.layers.quantized import panels
from layercomb.supervised import Loop, TrainTask
from layercomb.transforms import buffers
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


def another_version(file, entry, monkeypatch):
    monkeypatch.setattr(weight_cache, '__version__', '99')


def another_layout(file, entry, monkeypatch):
    monkeypatch.setattr(weight_cache, 'LAYOUT', 99)


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
        changed_file, another_version, another_layout, cut_off, cut_off_in_the_header, empty,
        longer, nothing_but_noise, *(flipped(at) for at in (0, 9, 15, 20, 70, 300, 5000, -1)),
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


def test_a_file_that_changes_while_it_is_read_is_not_kept(cache, tmp_path):
    source = tmp_path / 'source'
    source.write_text('before')

    def make():
        source.write_text('afterwards')
        return {'x': jnp.ones(3)}

    assert weight_cache.weights_of(cache, source, {}, make)['x'].shape == (3,)
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
    found = weight_cache.weights_of(cache, source, {}, lambda: dict(weights))
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


def aligned(directory, offset):
    """Moves the numbers of a safetensors file to begin at an offset from a multiple of 64."""
    path = directory / 'model.safetensors'
    data = path.read_bytes()
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + n])
    # Each tensor of these has a multiple of 64 bytes.
    assert not any(first % 64 for first, _ in (
        each['data_offsets'] for name, each in header.items() if name != '__metadata__'
    ))  # fmt: skip
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + (offset - 8 - len(text)) % 64)
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + n :])


@pytest.fixture
def directory(tmp_path):
    net = models.GPT2(vocab_size=96, d_model=64, d_ff=96, n_layers=2, n_heads=4, max_len=64)
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    huggingface.save(tmp_path / 'model', lc.Model(net, weights))
    return tmp_path / 'model'


@pytest.mark.parametrize('offset', [0, 4, 8, 32, 60])
def test_safetensors_are_mapped_where_they_begin_at_multiples_of_64(directory, cache, offset):
    aligned(directory, offset)
    plain, _ = huggingface.load(directory)
    model, _ = huggingface.load(directory, cache=cache)
    assert not cache.exists()
    same(model.weights, plain.weights)
    if sys.platform == 'linux':
        path = directory / 'model.safetensors'
        found = {name for name, x in trees.flatten(model.weights).items() if is_mapped(x, path)}
        assert ('embedding/table' in found) == (offset == 0), found
        assert not any(is_mapped(x, path) for x in trees.flatten(plain.weights).values())


def test_a_mapped_file_may_be_replaced_by_its_own_weights(directory, cache):
    aligned(directory, 0)
    model, _ = huggingface.load(directory, cache=cache)
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


def test_training_starts_from_mapped_weights_and_leaves_their_file_alone(directory, cache):
    aligned(directory, 0)
    path = directory / 'model.safetensors'
    before = path.read_bytes()
    plain, _ = huggingface.load(directory)
    model, _ = huggingface.load(directory, cache=cache)
    made = trained(model.layer, model.weights)
    same(made, trained(plain.layer, plain.weights))
    assert not np.array_equal(made['embedding']['table'], plain.weights['embedding']['table'])
    same(model.weights, plain.weights)
    assert path.read_bytes() == before


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


def refuses(file, cache, why):
    wanted, _ = gguf.load(file)
    with pytest.warns(UsageWarning, match=why) as told:
        model, _ = gguf.load(file, cache=cache)
    same(model.weights, wanted.weights)
    assert len(told) == 1 and '\n' not in str(told[0].message)


def test_a_folder_that_cannot_be_written_costs_a_warning(file, cache, monkeypatch):
    def refused(*given, **more):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patched:
        patched.setattr(weight_cache.tempfile, 'mkstemp', refused)
        refuses(file, cache, r'not kept in .*cache.* \(Permission denied\), so each start makes')
    gguf.load(file, cache=cache)
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in ('utime', 'replace'):
            patched.setattr(weight_cache.os, name, refused)
        gguf.load(file, cache=cache)  # what is there can be read


def test_a_file_in_the_place_of_the_folder_costs_a_warning(file, cache):
    cache.write_text('')
    refuses(file, cache, 'not kept')
    assert cache.read_text() == ''


def test_a_full_disk_costs_a_warning_and_leaves_nothing(file, cache, monkeypatch):
    usage = shutil.disk_usage('/')
    with monkeypatch.context() as patched:
        patched.setattr(weight_cache.shutil, 'disk_usage', lambda path: usage._replace(free=1000))
        refuses(file, cache, 'No space left')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(weight_cache.os, 'fsync', full)
    refuses(file, cache, 'No space left')
    assert not list(cache.iterdir())


def test_what_is_too_large_is_not_kept(file, cache, monkeypatch):
    monkeypatch.setattr(weight_cache, 'LARGEST', 100)
    refuses(file, cache, 'bytes are more than the 100 of the folder')
    assert not cache.exists()


def test_entries_are_deleted_after_a_while_or_when_they_are_many(cache, tmp_path, monkeypatch):
    def keep(name):
        source = tmp_path / name
        source.touch()
        there = set(cache.glob('*'))
        weight_cache.weights_of(cache, source, {}, lambda: {'x': jnp.zeros(1000)})
        return (set(cache.glob('*')) - there).pop()

    first = keep('a')
    others = [cache / name for name in ('my.weights', 'layercomb-notes.txt', 'x.part')]
    parts = [cache / 'layercomb-1.part', cache / 'layercomb-2.part']
    for path in (*others, *parts):
        path.write_text('')
    for path in (first, *others, parts[0]):
        os.utime(path, (1e9, 1e9))
    second = keep('b')
    assert {second, *others, parts[1]} == set(cache.iterdir())
    os.utime(second, (second.stat().st_mtime - 100,) * 2)
    third = keep('c')
    assert second.exists()
    monkeypatch.setattr(weight_cache, 'LARGEST', third.stat().st_size * 3 // 2)
    keep('c2')
    assert not second.exists() and not third.exists()


def test_the_layout_is_that_of_its_number():
    """If this fails, what is kept has changed: raise `panels.LAYOUT`, and put the sums here."""
    values = np.arange(32 * 64, dtype=np.int64).reshape(32, 64) * 7919 % 251 - 125
    scales = np.arange(32 * 2, dtype=np.float32).reshape(32, 2)
    words, interleaved = panels.of_rows(values.astype(np.int8), scales, 1)
    packed, _ = panels.of_rows(values.astype(np.uint8), scales, 1)
    at = np.arange(1, words.size + 1, dtype=np.uint64)
    sums = [int((np.ravel(x).view(np.uint32) * at[: x.size]).sum() % 2**32)
            for x in (words, packed, interleaved)]  # fmt: skip
    assert (panels.LAYOUT, sums) == (1, [192598085, 107098784, 1572864000])
