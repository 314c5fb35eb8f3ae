"""Files that are damaged or hostile: nothing in them is run, and little memory is taken.

The slow reader beside ours is Python's own, `pickle.loads`, of files that Trax wrote.
"""

from __future__ import annotations

import copyreg
import gzip
import io
import os
import pickle
import shutil
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from layercomb.errors import UsageError
from layercomb.interop import trax
from layercomb.interop.trax import files, parameters, pickles

DATA = Path(__file__).parents[2] / 'data' / 'trax'
RUN = []  # what hostile pickles append to, if they are run


def ran(*_):
    RUN.append(True)
    return 1


class Calls:
    """A value whose pickle calls a function."""

    def __init__(self, function, *arguments, **more):
        self.reduced = (function, arguments, *more.values())

    def __reduce__(self):
        return self.reduced


class Refers:
    """A value with a persistent id."""


class WithIds(pickle.Pickler):
    def persistent_id(self, value):
        return 'print(1)' if isinstance(value, Refers) else None


def with_ids(protocol):
    file = io.BytesIO()
    WithIds(file, protocol).dump({'flat_weights': [Refers()]})
    return file.getvalue()


def objects():
    x = np.empty(2, object)
    x[:] = [Calls(ran), 2]
    return x


HOSTILE = {
    'os.system': lambda: Calls(os.system, 'echo run'),
    'eval': lambda: Calls(eval, "__import__('tests')"),
    'exec': lambda: Calls(exec, 'RUN.append(1)'),
    'a function of ours': lambda: Calls(ran),
    'getattr': lambda: Calls(getattr, 'x', 'join'),
    'numpy.load': lambda: Calls(np.load, 'x'),
    'numpy.frombuffer': lambda: Calls(np.frombuffer, b'1234'),
    'the factory of a dict': lambda: Calls(defaultdict, ran),
    'copyreg': lambda: Calls(copyreg._reconstructor, Calls, object, None),
    'a slice': lambda: slice(1, 2),
    'a set': lambda: {1, 2},
    'a frozen set': lambda: frozenset({1, 2}),
    'a complex number': lambda: 1j,
    'a class': lambda: Calls,
    'an array of objects': objects,
    'an array of text': lambda: np.array(['a', 'b']),
    'an array of records': lambda: np.zeros(2, [('x', 'f4')]),
    'a big-endian array': lambda: np.zeros(2, '>f4'),
    'a path': lambda: Path('/'),
    'a state for a list': lambda: Calls(list, (), {'x': 1}),
    'items for a dict': lambda: Calls(OrderedDict, state=None, items=None, more=iter([(ran, 1)])),
    'an array by its class': lambda: Calls(np.ndarray, (2,), 'f4'),
}


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint of given bytes, and returns its path."""

    def write(data, unpacked=None):
        path = tmp_path / 'model.pkl.gz'
        path.write_bytes(data if unpacked is None else gzip.compress(unpacked, 1))
        return path

    return write


def refusal(path, **known):
    with pytest.raises(UsageError) as e:
        trax.load(path, **known)
    assert '\n' not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_pickles_run_nothing(saved, monkeypatch, kind, protocol):
    data = pickle.dumps({'flat_weights': [HOSTILE[kind]()]}, protocol)
    for name in ('system', 'popen', 'execv'):
        monkeypatch.setattr(os, name, ran)
    said = refusal(saved(None, data))
    assert not RUN
    assert 'nothing of it was run' in said or 'cannot be followed' in said


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_persistent_ids_are_refused(saved, protocol):
    said = refusal(saved(None, with_ids(protocol)))
    assert 'PERSID, which' in said or 'has the instruction' in said


@pytest.mark.parametrize(
    ('data', 'words'),
    [
        (b'cos\nsystem\n(S"echo"\ntR.', "names 'os.system'"),
        (b'(S"echo"\nios\nsystem\n.', 'has the instruction STRING'),
        (b'(ios\nsystem\n.', 'has the instruction INST'),
        (b'cnumpy\ndtype\n(otR.', 'has the instruction OBJ'),
        (b'\x82\x01.', 'has the instruction EXT1'),
        (b'(\x8c\x02f4o.', 'has the instruction OBJ'),
        (b'}\x8c\x01xb.', 'gives a state to a dict'),
        (b'cnumpy\ndtype\n)b.', 'gives a state to a dtype'),
        (b'cnumpy\ndtype\n)R.', 'makes a dtype of unknown arguments'),
        (b'cnumpy\ndtype\n\x8c\x02O8\x85R.', 'makes a dtype of unknown arguments'),
        (b'\x8c\x05numpy\x8c\x05dtype\x93)\x81.', 'makes a dtype of unknown arguments'),
        (b']]\x93.', 'takes for a name a list'),
        (b'}](K\x01K\x02u.', 'adds to a list'),
        (b'}]K\x01s.', 'has as a key of a dict a list'),
        (b'))R.', 'calls a tuple'),
        (b'cnumpy\nndarray\n)R.', 'calls a ndarray'),
        (b'cbuiltins\nlist\n)R.', 'calls a list'),
        (b'ccollections\ndefaultdict\nccollections\ndefaultdict\n\x85R.', 'makes a dict of unkn'),
        (b'K\x01K\x02.', 'leaves no single value'),
        (b'(K\x01.', 'leaves no single value'),
        (b'.', 'leaves no single value'),
        (b'K\x01', 'cannot be followed'),
        (b'', 'cannot be followed'),
        (b'h\x05.', 'cannot be followed'),
        (b't.', 'cannot be followed'),
        (b'\x86.', 'cannot be followed'),
        (b'\xff.', 'cannot be followed'),
        (b'\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.', 'cannot be followed'),
        (b'}r\xff\xff\xff\xff.', 'is no checkpoint of Trax'),
        (b'K\x01.', 'is no checkpoint of Trax'),
        (b'}\x8c\x0cflat_weights]K\x01as.', 'flat_weights holds other things than arrays'),
    ],
)
def test_pickles_that_are_none_of_trax_are_refused(saved, data, words):
    assert words in refusal(saved(None, data))


def plain(value):
    """What our reader gives, as Python's reader gives it."""
    if isinstance(value, pickles.Array):
        return value.value()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def same(ours, theirs):
    if isinstance(theirs, (np.ndarray, np.generic)):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=True)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and all(
            same(*pair) for pair in zip(ours, theirs, strict=True)
        )
    return type(ours) is type(theirs) and ours == theirs


def values():
    """Plain values and arrays such as checkpoints hold."""
    numbers = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
    texts = st.text(max_size=5) | st.binary(max_size=5)
    kinds = st.sampled_from(['f4', 'f8', 'i4', 'u2', 'u4', 'b1', ml_dtypes.bfloat16])
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    arrays = st.builds(lambda s, k: (np.arange(np.prod(s)) % 7).reshape(s).astype(k), shapes, kinds)
    arrays |= arrays.map(lambda x: np.asfortranarray(x)) | arrays.map(lambda x: x[..., None][::2])
    return st.recursive(
        numbers | texts | arrays | st.builds(np.float32, st.floats(width=32, allow_nan=False)),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        ),
        max_leaves=12,
    )


@hypothesis.given(value=values(), protocol=st.integers(3, pickle.HIGHEST_PROTOCOL))
@hypothesis.settings(max_examples=150, deadline=None)
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    assert same(plain(pickles.read(data, 'x')), pickle.loads(data))


def test_one_list_in_many_places_is_one():
    shared = [np.ones(3, np.float32)]
    read = pickles.read(pickle.dumps([shared, shared, {'x': shared}]), 'x')
    assert read[0] is read[1] is read[2]['x']


def test_a_history_of_trax_is_read():
    history = {'_values': {'train': defaultdict(list, {'loss': [(1, np.float32(2.5))]})}}
    read = pickles.read(pickle.dumps(history), 'x')
    assert plain(read)['_values']['train']['loss'] == [(1, 2.5)]


@pytest.mark.parametrize('name', ['lm', 'saved'])
def test_weights_are_those_that_the_plain_reader_gives(name):
    given = files.weights_of(DATA / name / 'model.pkl.gz')
    assert given.shapes == [x.shape for x in given.values()]
    assert all(x.dtype == np.float32 for x in given.values())
    if name == 'lm':
        file = io.BytesIO(gzip.decompress((DATA / name / 'model.weights.npy.gz').read_bytes()))
        for x in given.values():
            np.testing.assert_array_equal(x, np.load(file, allow_pickle=False))
        assert not file.read()


@pytest.mark.parametrize('is_fortran', [False, True])
@pytest.mark.parametrize('version', [(1, 0), (2, 0)])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, is_fortran, version):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with gzip.open(tmp_path / 'x.weights.npy.gz', 'wb') as file:
        for y in (x, x[0, 0], x[0, 0, 0], x[:0], x.astype('f8')):
            y = np.asfortranarray(y) if is_fortran and y.ndim else y
            np.lib.format.write_array(file, y, version)
    (tmp_path / 'x.pkl.gz').write_bytes(gzip.compress(pickle.dumps({'flat_weights': 2})))
    given = files.weights_of(tmp_path / 'x.pkl.gz')
    assert given.shapes == [(2, 3, 4), (4,), (), (0, 3, 4), (2, 3, 4)]
    for ours, theirs in zip(given.values(), (x, x[0, 0], x[0, 0, 0], x[:0], x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_weights_may_lie_beside_a_file_of_any_name(tmp_path):
    for name in ('own.model', 'own.pkl.gz'):
        shutil.copy(DATA / 'lm' / 'model.pkl.gz', tmp_path / name)
        shutil.copy(DATA / 'lm' / 'model.weights.npy.gz', tmp_path / f'{name}.npy')
        model, _ = trax.load(tmp_path / name, n_heads=2, ff_activation='Gelu')
        assert model.n_weights == 2060
    (tmp_path / 'own.pkl.gz.npy').unlink()
    assert 'keeps its weights in own.weights.npy.gz' in refusal(tmp_path / 'own.pkl.gz')


def header(text, version=1, length=None):
    size = (len(text) if length is None else length).to_bytes(2 * version, 'little')
    return b'\x93NUMPY' + bytes([version, 0]) + size + text


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (900000000000, 8), }\n"


@pytest.mark.parametrize(
    ('data', 'words'),
    [
        (b'PK\x03\x04' + bytes(20), 'array 0 has no header'),
        (b'\x93NUMPY\x09\x00' + bytes(20), 'array 0 has no header'),
        (header(b'{}\n'), 'the header of array 0 is none'),
        (header(b"{'descr': __import__('os').system('x')}\n"), 'the header of array 0 is none'),
        (header(HUGE), 'unpacks to more than 100 times its size'),
        (header(HUGE, 2, 2**32 - 1), 'ends in the middle of an array'),
        (header(HUGE.replace(b'<f4', b'|O')), 'array 0 holds |O, and weights are floats'),
        (header(HUGE.replace(b'<f4', b'<i4')), 'array 0 holds <i4, and weights are floats'),
        (header(HUGE.replace(b'900000000000', b'9' * 30)), 'the header of array 0 is none'),
        (header(HUGE.replace(b'900000000000', b'2')), 'ends in the middle of an array'),
        (header(HUGE.replace(b'900000000000', b'0')) * 50001, 'has more than 50,000 arrays'),
        (b'\x93NUM', 'ends in the middle of an array'),
    ],
)
def test_files_of_weights_that_are_none_are_refused(tmp_path, data, words):
    shutil.copytree(DATA / 'lm', tmp_path / 'run')
    (tmp_path / 'run' / 'model.weights.npy.gz').write_bytes(gzip.compress(data, 1))
    assert words in refusal(tmp_path / 'run')


def test_files_that_are_not_compressed_are_refused(saved):
    assert 'not compressed by gzip' in refusal(saved(pickle.dumps({'flat_weights': []})))
    whole = (DATA / 'saved' / 'model.pkl.gz').read_bytes()
    assert 'is damaged' in refusal(saved(whole[:-4]))
    assert 'is damaged' in refusal(saved(whole[:-8] + bytes(8)))


def peak(run):
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_fills_no_memory(tmp_path, monkeypatch):
    """Zeros that shrink a thousand times, as a pickle and as weights."""
    monkeypatch.setattr(files, 'SLACK', 2**20)
    shutil.copytree(DATA / 'lm', tmp_path / 'run')
    bomb = gzip.compress(header(HUGE.replace(b'900000000000', b'5000000')) + bytes(2**25))
    for name in ('model.weights.npy.gz', 'model.pkl.gz'):
        (tmp_path / 'run' / name).write_bytes(bomb)
        taken = peak(lambda: refusal(tmp_path / 'run'))
        assert taken < 100 * len(bomb) + 2**24
    assert 'unpacks to more than 100 times its size' in refusal(tmp_path / 'run')


def test_a_pickle_of_too_many_steps_is_refused(saved, monkeypatch):
    monkeypatch.setattr(pickles, 'N_STEPS', 1000)
    assert 'has more than 1,000 steps' in refusal(saved(None, b']' * 2000 + b'.'))


def test_deep_values_are_no_trouble(saved):
    assert 'is no checkpoint' in refusal(saved(None, b')' + b'\x85' * 100_000 + b'.'))
    assert 'as a key of a dict a tuple' in refusal(
        saved(None, b'})' + b'\x85' * 100_000 + b'K\x01s.')
    )


# Random damage: a UsageError or a model, and never much memory.

WHOLE = {
    name: {file.name: file.read_bytes() for file in (DATA / name).glob('model.*')}
    for name in ('lm', 'reformer', 'saved')
}
KNOWN = {'n_heads': 2, 'ff_activation': 'FastGelu'}


def damage(data, draw):
    """Some bytes flipped, cut out or doubled."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(['flip', 'byte', 'cut', 'end', 'double']))
        if kind == 'flip':
            data[at : at + 1] = bytes(b ^ (1 << draw(st.integers(0, 7))) for b in data[at : at + 1])
        elif kind == 'byte':
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=3))
        elif kind == 'cut':
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == 'end':
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(WHOLE)))
    file = data.draw(st.sampled_from(sorted(WHOLE[name])))
    folder = tmp_path_factory.mktemp('run')
    for other, content in WHOLE[name].items():
        (folder / other).write_bytes(content)
    content = WHOLE[name][file]
    if data.draw(st.booleans()):
        content = damage(content, data.draw)
    else:  # past the checksum
        content = gzip.compress(damage(gzip.decompress(content), data.draw), 1)
    (folder / file).write_bytes(content)
    taken = peak(lambda: _read(folder, name))
    shutil.rmtree(folder)
    assert taken < 2**25


def _read(folder, name):
    try:
        given = files.weights_of(folder / 'model.pkl.gz')
        n = sum(x.size for x in given.values())
    except UsageError as e:
        assert '\n' not in str(e)
        return
    assert n < 10_000
    try:
        trax.load(folder, **KNOWN, **({'attention_type': 'X'} if name == 'reformer' else {}))
    except UsageError as e:
        assert '\n' not in str(e)


@hypothesis.given(text=st.text(alphabet='ab.@%/=([{}]),\'"\\#\n 1-', max_size=60))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_is_a_config_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / 'config.gin'
    path.write_text(text)
    bindings = parameters.read_gin(path)
    known = parameters.Parameters(bindings, {}, has_config=True)
    for key in bindings:
        try:
            known.get(*key.rpartition('.')[::2])
        except UsageError as e:
            assert '\n' not in str(e)
