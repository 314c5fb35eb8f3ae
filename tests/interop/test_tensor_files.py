"""Files of tensors: safetensors and torch's, right ones, damaged ones and hostile ones."""

from __future__ import annotations

import collections
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from layercomb.errors import UsageError
from layercomb.interop import pickles, safetensors

TORCH = Path(__file__).parents[1] / 'data' / 'pretrained' / 'torch'  # see make_torch.py
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def sound(tmp_path):
    arrays = {
        'a': np.arange(6, dtype=np.float32).reshape(2, 3),
        'b': np.arange(4, dtype=np.float64),
        'c': np.arange(4).astype(ml_dtypes.bfloat16),
        'half': np.ones((1, 2), np.float16),
        'ints': np.arange(3),
        'none': np.zeros((0, 3), np.float32),
        'one': np.array(2.5, np.float32),
    }
    save_file(arrays, tmp_path / 'model.safetensors', {'format': 'pt'})
    return tmp_path / 'model.safetensors', arrays


def test_safetensors(sound):
    path, arrays = sound
    found = safetensors.read_tensors(path)
    assert found.keys() == arrays.keys()
    for name in arrays.keys() - {'ints'}:
        read = found[name].read()
        assert read.dtype == arrays[name].dtype and not read.flags.owndata
        np.testing.assert_array_equal(read, arrays[name])
    with pytest.raises(UsageError, match="the tensor 'ints' holds int64"):
        found['ints'].read()


def header(tmp_path, entries, n_bytes=8, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path = tmp_path / 'model.safetensors'
    start = struct.pack('<Q', len(text) if length is None else length)
    path.write_bytes(start + text + bytes(n_bytes))
    return path


def entry(first=0, last=8, shape=(2,), dtype='F32', **more):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [first, last], **more}


@pytest.mark.parametrize(
    'entries, error',
    [
        ({'a': entry(0, 4, (1,))}, 'the last 4 bytes belong to no tensor'),
        ({'a': entry(4, 8, (1,))}, "the bytes of 'a' do not begin where those before it end"),
        ({'a': entry(), 'b': entry()}, "the bytes of 'b' do not begin"),
        ({'a': entry(), 'b': entry(4, 8, (1,))}, "the bytes of 'b' do not begin"),
        ({'a': entry(0, 10**15, (10**15 // 4,))}, "'a' would end at byte 1,000,000"),
        ({'a': entry(shape=(10**9, 10**9))}, "'a' has 8 bytes, and its shape is"),
        ({'a': entry(shape=(2**62, 4))}, "'a' has 8 bytes, and its shape is"),
        ({'a': entry(shape=(-2,))}, "the entry of 'a' is damaged"),
        ({'a': entry(shape=(True, 2))}, "the entry of 'a' is damaged"),
        ({'a': entry(8, 0)}, "the bytes of 'a' do not begin"),
        ({'a': {**entry(), 'data_offsets': [0]}}, "the entry of 'a' is damaged"),
        ({'a': 3}, "the entry of 'a' is damaged"),
        ({'a': {'dtype': 'F32'}}, "the entry of 'a' is damaged"),
        ({'a': entry(dtype='F4')}, "'a' is of type 'F4', and known are F64, F32"),
        ({'a': entry(dtype=['F32'])}, r"'a' is of type \['F32'\]"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'[]', 'holds no object'),
        (b'{', 'is damaged'),
        (b'\xff', 'is damaged'),
        (b'[' * 100000, 'is damaged'),
        (b'{"a": ' + b'9' * 9999 + b'}', 'is damaged'),
    ],
)
def test_headers_that_lie(tmp_path, entries, error):
    with pytest.raises(UsageError, match=error) as e:
        safetensors.read_tensors(header(tmp_path, entries))
    assert '\n' not in str(e.value) and str(tmp_path) not in str(e.value)


@pytest.mark.parametrize('length', [9, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path, length):
    with pytest.raises(UsageError, match='its header would end at byte'):
        safetensors.read_tensors(header(tmp_path, b'', 0, length))


def test_files_that_are_not_there(tmp_path):
    (tmp_path / 'empty').write_bytes(b'')
    for read in (safetensors.read_tensors, pickles.read_tensors):
        with pytest.raises(UsageError, match='is not there: download the whole model'):
            read(tmp_path / 'nothing')
        with pytest.raises(UsageError, match='empty is'):
            read(tmp_path / 'empty')


def damaged(data, original):
    """A file cut off, or with a few bytes changed."""
    if data.draw(st.booleans()):
        return original[: data.draw(st.integers(0, len(original) - 1))]
    made = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    return bytes(made)


def read_all(read, path):
    """Reads all tensors of a file, which is refused in one line, or gives what is in it."""
    try:
        for tensor in read(path).values():
            assert tensor.n_bytes <= path.stat().st_size
            try:
                np.asarray(tensor.read()).sum()
            except UsageError as e:
                assert 'holds' in str(e)
    except UsageError as e:
        assert '\n' not in str(e) and len(str(e)) < 400


@given(st.data())
@FUZZ
def test_damaged_safetensors(sound, data):
    path, _ = sound
    other = path.with_name('damaged')
    other.write_bytes(damaged(data, path.read_bytes()))
    with np.errstate(all='ignore'):
        read_all(safetensors.read_tensors, other)


def test_torch():
    found = pickles.read_tensors(TORCH / 'tensors.bin')
    with np.load(TORCH / 'tensors.npz') as known:
        assert found.keys() == set(known)
        for name in found.keys() - {'long'}:
            read = found[name].read()
            assert not read.flags.writeable
            np.testing.assert_array_equal(read.astype(np.float64), known[name])
    assert found['bfloat16'].dtype == ml_dtypes.bfloat16 and found['half'].dtype == np.float16
    assert pickles.read_tensors(TORCH / 'module.bin').keys() == {'weight', 'bias'}


def test_torch_before_zip():
    with pytest.raises(UsageError, match=r'legacy.bin is no file of torch 1.6 or later.*trust'):
        pickles.read_tensors(TORCH / 'legacy.bin')


def archive(tmp_path, program, compression=zipfile.ZIP_STORED, **records):
    path = tmp_path / 'pytorch_model.bin'
    with zipfile.ZipFile(path, 'w', compression) as made:
        made.writestr('archive/data.pkl', program)
        for name, data in records.items():
            made.writestr(f'archive/{name.replace("_", "/")}', data)
    return path


class Marker:
    """A value whose pickle makes a file when it is loaded."""

    def __init__(self, path, run):
        self.path, self.run = path, run

    def __reduce__(self):
        return self.run(self.path)


RUNS = {
    'os.system': lambda path: (os.system, (f'touch {path}',)),
    'builtins.exec': lambda path: (exec, (f'open({str(path)!r}, "w")',)),
    'builtins.open': lambda path: (open, (str(path), 'w')),
    'os.mkdir': lambda path: (os.mkdir, (str(path),)),
    'collections.OrderedDict': lambda path: (collections.OrderedDict, ([('a', open)],)),
}


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_runs_nothing(tmp_path, name, protocol):
    marker = tmp_path / 'marker'
    for value in (Marker(marker, RUNS[name]), {'a': Marker(marker, RUNS[name])}):
        program = pickle.dumps(value, protocol)
        with pytest.raises(UsageError, match=r'pytorch_model.bin (asks|is damaged)') as e:
            pickles.read_tensors(archive(tmp_path, program))
        if protocol >= 2:
            assert f'asks to run {name.replace("os.", "posix.", 1)}' in str(e.value) or (
                'builtins' in name or 'Ordered' in name or 'io.open' in str(e.value)
            )
        assert not marker.exists()


def tensor(shape=(2,), strides=(1,), first=0, key='0', kind='FloatStorage', n=2, name='a'):
    """The program of a dict with one tensor, as torch writes it in protocol 2."""

    def text(x):
        return b'X' + struct.pack('<I', len(x)) + x.encode()

    def integers(values):
        return b'(' + b''.join(b'\x8a\x08' + struct.pack('<q', v) for v in values) + b't'

    storage = b'(' + text('storage') + f'ctorch\n{kind}\n'.encode() + text(key) + text('cpu')
    storage += integers([n])[1:-1] + b'tQ'
    view = b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + integers([first])[1:-1]
    view += integers(shape) + integers(strides) + b'\x89ccollections\nOrderedDict\n)RtR'
    return b'\x80\x02}' + text(name) + view + b's.'


def test_the_program_of_a_tensor(tmp_path):
    path = archive(tmp_path, tensor(), data_0=np.array([1, 2], np.float32).tobytes())
    np.testing.assert_array_equal(pickles.read_tensors(path)['a'].read(), [1, 2])


@pytest.mark.parametrize(
    'wrong, error',
    [
        ({'shape': (3,)}, "'a' goes past its numbers"),
        ({'shape': (10**9, 10**9), 'strides': (0, 0)}, "'a' goes past its numbers"),
        ({'strides': (2,)}, "'a' goes past its numbers"),
        ({'strides': (-1,), 'first': 1}, 'describes a tensor in an unknown way'),
        ({'first': 1}, "'a' goes past its numbers"),
        ({'first': -1}, 'describes a tensor in an unknown way'),
        ({'shape': (-2,)}, 'describes a tensor in an unknown way'),
        ({'shape': (1,) * 40, 'strides': (1,) * 40}, 'describes a tensor in an unknown way'),
        ({'shape': (1, 2)}, 'describes a tensor in an unknown way'),
        ({'n': 10**12}, "the numbers of 'a'"),
        ({'n': -1}, 'holds numbers of an unknown kind'),
        ({'key': '1'}, "the numbers of 'a'"),
        ({'key': '../0'}, "the numbers of 'a'"),
        ({'kind': 'QInt8Storage'}, r'unknown kind \(torch.QInt8Storage\)'),
    ],
)
def test_tensors_that_lie(tmp_path, wrong, error):
    with pytest.raises(UsageError, match=error):
        pickles.read_tensors(archive(tmp_path, tensor(**wrong), data_0=bytes(8)))


@pytest.mark.parametrize(
    'program, error',
    [
        (pickle.dumps([1]), 'holds no dict of tensors'),
        (pickle.dumps({'a': 1}), "'a' is no tensor"),
        (pickle.dumps({1: 1}), 'has a name twice, or one that is no text'),
        (b'\x80\x02}' + b'X\1\0\0\0aNs' * 2 + b'.', 'has a name twice'),
        (b'', 'is damaged'),
        (b'\x80\x02}', 'is damaged'),
        (b'.', 'is damaged'),
        (b'\x80\x02r\xff\xff\xff\xff.', 'is damaged'),  # an index of the memo, 32 GB in CPython
        (b'\x80\x02\x8d' + b'\xff' * 8, 'is damaged'),  # a text of 2⁶⁴ bytes
        (b'\x80\x02]' + b'q\0h\0\x86' * 60 + b')R.', 'asks to run a tuple'),
        (b'\x80\x02}]' + b'q\0h\0\x86' * 60 + b'Ns.', 'no text'),  # its hash would take ages
        (b'\x80\x02i' + b'os\nsystem\n.', r'asks for what no tensor needs \(INST\)'),
        (b'\x80\x02cos\nsystem\n)\x81.', r'asks for what no tensor needs \(NEWOBJ\)'),
        (b'\x80\x02\x82\x01.', r'asks for what no tensor needs \(EXT1\)'),
    ],
)
def test_programs_that_are_none(tmp_path, program, error):
    with pytest.raises(UsageError, match=error) as e:
        pickles.read_tensors(archive(tmp_path, program))
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_archives_that_lie(tmp_path):
    with pytest.raises(UsageError, match='is compressed or damaged'):
        pickles.read_tensors(archive(tmp_path, b' ' * 10**6, zipfile.ZIP_DEFLATED))
    with pytest.raises(UsageError, match='big-endian'):
        pickles.read_tensors(archive(tmp_path, tensor(), byteorder=b'big'))
    path = tmp_path / 'other.bin'
    with zipfile.ZipFile(path, 'w') as made:
        made.writestr('a/b', b'')
    with pytest.raises(UsageError, match=r'holds no data.pkl'):
        pickles.read_tensors(path)


@given(st.data())
@FUZZ
def test_damaged_torch(tmp_path, data):
    path = tmp_path / 'damaged.bin'
    original = (TORCH / data.draw(st.sampled_from(['tensors.bin', 'legacy.bin']))).read_bytes()
    path.write_bytes(damaged(data, original))
    with np.errstate(all='ignore'):
        read_all(pickles.read_tensors, path)


@given(st.binary(max_size=60))
@FUZZ
def test_any_program(tmp_path, program):
    for each in (program, program + b'.', b'\x80\x02}' + program + b's.'):
        read_all(pickles.read_tensors, archive(tmp_path, each, data_0=bytes(8)))
