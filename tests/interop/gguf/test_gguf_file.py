"""The header of a .gguf file is checked before anything is made of it; blocks are as they were."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercomb.errors import UsageError
from layercomb.interop.gguf import blocks as blocks_module
from layercomb.interop.gguf import file as gguf_file

gguf = pytest.importorskip('gguf')
KINDS = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q6_K')


def random_rows(kind, rows, length, seed=0):
    """Bytes of a tensor, any bit pattern, with scales that are finite."""
    rng = np.random.default_rng(seed)
    size, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows, length // size, n_bytes), np.uint8)
    if kind == 'F32':
        return rng.normal(size=(rows, length)).astype(np.float32).view(np.uint8)
    if kind == 'F16':
        return rng.normal(size=(rows, length)).astype(np.float16).view(np.uint8)
    scales = {'BF16': [1], 'Q4_1': [1, 3], 'Q4_K': [1, 3], 'Q5_K': [1, 3], 'Q6_K': [209]}
    for at in scales.get(kind, [1]):  # the byte with sign and exponent: 1/16 or so
        data[..., at] = 0x2C
    return data.reshape(rows, -1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A file with every kind of metadata and of tensor."""
    path = tmp_path_factory.mktemp('gguf') / 'all.gguf'
    w = gguf.GGUFWriter(path, 'llama')
    for add, value in (
        (w.add_uint8, 1), (w.add_int8, -1), (w.add_uint16, 2), (w.add_int16, -2),
        (w.add_uint32, 3), (w.add_int32, -3), (w.add_uint64, 4), (w.add_int64, -4),
        (w.add_float32, 0.5), (w.add_float64, 0.25), (w.add_bool, True), (w.add_string, 'é'),
        (w.add_array, ['a', 'ü', '']), (w.add_array, [1, 2, 3]), (w.add_array, [0.5, 1.5]),
    ):  # fmt: skip
        add(f'{add.__name__}.{value}', value)
    for kind in KINDS:
        number = gguf.GGMLQuantizationType[kind]
        data = random_rows(kind, 3, 256)
        plain = {'F32': np.float32, 'F16': np.float16}.get(kind)
        w.add_tensor(kind, data if plain is None else data.view(plain), raw_dtype=number)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_metadata_and_tensors_are_those_that_the_library_reads(whole):
    ours, theirs = gguf_file.read(whole), gguf.GGUFReader(whole)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith('GGUF.')}
    assert ours.metadata == fields
    assert list(ours.tensors) == [t.name for t in theirs.tensors] == list(KINDS)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.blocks.name == tensor.tensor_type.name
        assert mine.shape == tuple(tensor.shape.tolist()[::-1]) == (3, 256)
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(3, 256)
        np.testing.assert_array_equal(mine.blocks.numbers(mine.data), want)


def test_rows_are_dequantized_piece_by_piece(whole, monkeypatch):
    monkeypatch.setattr(blocks_module, '_PIECE', 512)
    for tensor in gguf_file.read(whole).tensors.values():
        pieces = list(tensor.blocks.pieces(tensor.data))
        assert [len(x) for _, x in pieces] == [2, 1]
        whole_tensor = tensor.blocks.numbers(tensor.data)
        for rows, x in pieces:
            np.testing.assert_array_equal(x, whole_tensor[rows])


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q5_K', 'Q6_K'])
@pytest.mark.parametrize('length', [256, 512])
def test_integers_are_the_same_numbers(kind, length):
    blocks = {b.name: b for b in blocks_module.BLOCKS.values()}[kind]
    data = random_rows(kind, 5, length, seed=length)
    q, scales = blocks_module.integers(blocks, data)
    assert q.dtype == np.int8 and q.shape == (5, length)
    parts = [np.repeat(x, blocks.group, -1) for x in np.split(scales, 1 + blocks.minima, -1)]
    assert blocks.bits is not None
    if blocks.minima:
        made = (q.astype(np.float32) + 2 ** (blocks.bits - 1)) * parts[0] + parts[1]
    else:
        made = q.astype(np.float32) * parts[0]
    np.testing.assert_array_equal(made, blocks.numbers(data))


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0', 'Q4_1'])
@pytest.mark.parametrize('length', [64, 96, 256])
def test_blocks_of_32_go_out_as_they_came(kind, length):
    blocks = {b.name: b for b in blocks_module.BLOCKS.values()}[kind]
    data = random_rows(kind, 5, length, seed=length)
    q, scales = blocks_module.integers(blocks, data)
    values = blocks_module.pack4(q.view(np.uint8)) if blocks.bits == 4 else q
    pack = blocks_module.with_minima if blocks.minima else blocks_module.packed
    for its in (scales, np.repeat(scales, 2, -1) if not blocks.minima else scales):
        back, stored = pack(values, its)
        assert back.name == kind
        np.testing.assert_array_equal(stored, data)


def test_minima_that_gguf_does_not_know_are_refused():
    values, scales = np.zeros((2, 32), np.uint8), np.ones((2, 4), np.float32)
    assert blocks_module.with_minima(values, scales)[0].name == 'Q4_1'
    for wrong in ((values, scales + 1e-6), (values.view(np.int8), scales), (values, scales * 1e9)):
        with pytest.raises(
            UsageError, match="another type: save it with dtype='q8_0', or 'float16'"
        ):
            blocks_module.with_minima(*wrong)


def test_wider_groups_become_several_blocks_and_others_are_refused():
    values = np.arange(-64, 64, dtype=np.int8).reshape(1, 128)
    found, data = blocks_module.packed(values, np.array([[0.5, 2.0]], np.float32))
    want = values * np.repeat(np.array([[0.5, 2.0]], np.float32), 64, -1)
    np.testing.assert_array_equal(found.numbers(data), want)
    with pytest.raises(UsageError, match='groups of 16 weights, and GGUF has blocks of 32'):
        blocks_module.packed(values, np.arange(8, dtype=np.float32)[None])
    with pytest.raises(UsageError, match='too large for the float16'):
        blocks_module.packed(values, np.array([[1e6, 1.0]], np.float32))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_is_refused_in_one_line_or_read_within_bounds(whole, tmp_path, data):
    content = bytearray(whole.read_bytes())
    header = 1500  # where a flipped byte says something about the rest
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / 'damaged.gguf'
    path.write_bytes(content)
    try:
        found = gguf_file.read(path)
    except UsageError as e:
        assert '\n' not in str(e) and len(str(e)) < 600
    else:
        assert sum(t.data.nbytes for t in found.tensors.values()) <= len(content)
        for tensor in found.tensors.values():
            assert tensor.blocks.numbers(tensor.data).size == np.prod(tensor.shape)


def number(n, code='Q'):
    return struct.pack(f'<{code}', n)


def text(s):
    return number(len(s)) + s.encode()


def lying(*parts, n_tensors=0, n_entries=0, version=3):
    return b'GGUF' + number(version, 'I') + number(n_tensors) + number(n_entries) + b''.join(parts)


def tensor(name, *axes, kind=0, offset=0):
    dims = b''.join(number(n) for n in axes)
    return text(name) + number(len(axes), 'I') + dims + number(kind, 'I') + number(offset)


NAMED = text('k') + number(9, 'I')  # an entry that is a list


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'no GGUF file: it has 0 bytes'),
        (b'PK\3\4' + bytes(40), 'does not begin with "GGUF"'),
        (lying(version=1), 'of version 1, and known are versions 2 and 3'),
        (lying(version=3 << 24), 'for big-endian machines'),
        (lying(n_tensors=2**60), 'tensors are announced'),
        (lying(bytes(40), n_entries=2**40), 'tensors are announced'),
        (lying(number(2**62), bytes(99), n_entries=1), 'a text of 4,611,686,018,427,387,904 bytes'),
        (lying(NAMED, number(4, 'I'), number(2**61), n_entries=1), 'a list of 2,305,843'),
        (lying(NAMED, number(8, 'I'), number(2**61), n_entries=1), 'a list of 2,305,843'),
        (lying(NAMED, number(9, 'I'), number(1), n_entries=1), 'a list of the unknown kind 9'),
        (lying(text('k'), number(99, 'I'), bytes(9), n_entries=1), 'of the unknown kind 99'),
        (lying(2 * (text('k') + number(0, 'I') + b'1'), n_entries=2), "'k' is there twice"),
        (lying(number(1), b'\xff', number(0, 'I'), b'1', n_entries=1), 'not UTF-8'),
        (lying(tensor('t', 2**40, 2**40), n_tensors=1), 'is damaged'),
        (lying(tensor('t', 2**30), n_tensors=1), "the tensor 't' ends at byte 4,294,967,"),
        (lying(tensor('t', 8, 0), n_tensors=1), r"the tensor 't' is \(0, 8\)"),
        (lying(tensor('t', 1, 1, 1, 1, 1), n_tensors=1), "the tensor 't' has 5 axes"),
        (lying(tensor('t', 8, kind=10), n_tensors=1), 'of type Q2_K, and known are F32, F16, BF16'),
        (lying(tensor('t', 8, kind=99), n_tensors=1), 'of type number 99'),
        (lying(tensor('t', 8, kind=8), n_tensors=1), 'rows of 8 in the Q8_0 tensor'),
        (lying(tensor('t', 8, offset=1), n_tensors=1), 'is not aligned'),
        (lying(tensor('t', 8) * 2, bytes(99), n_tensors=2), "'t' is there twice"),
        (lying(tensor('t', 9), tensor('u', 8, offset=32), bytes(99), n_tensors=2), 'overlap'),
        (
            lying(text('general.alignment'), number(4, 'I'), number(0, 'I'), n_entries=1),
            'aligned to 0 bytes',
        ),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, content, message):
    path = tmp_path / 'lie.gguf'
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        gguf_file.read(path)
    assert '\n' not in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match=r'No such file.*: check the path'):
        gguf_file.read(tmp_path / 'missing.gguf')
    with pytest.raises(UsageError, match='Is a directory'):
        gguf_file.read(tmp_path)
