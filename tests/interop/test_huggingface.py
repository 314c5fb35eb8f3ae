"""Directories of Hugging Face: read as transformers reads them, written as it can read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layercomb_kernels
from layercomb import Model, data, interop, models, tl, transforms
from layercomb.errors import UsageError
from layercomb.interop import huggingface
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of
from layercomb.interop.huggingface import saving
from layercomb.interop.tensors import spill
from layercomb.supervised import decoding
from layercomb.transforms.quantization.holding import hold_wide

GPT2 = Path(__file__).parents[1] / 'data' / 'pretrained' / 'gpt2'  # see make_gpt2.py
LARGE = ('pytorch_model.bin', 'expected.npz', 'messages.json')


@pytest.fixture
def directory(tmp_path):
    return Path(shutil.copytree(GPT2, tmp_path / 'gpt2', ignore=shutil.ignore_patterns(*LARGE)))


@pytest.fixture(scope='module')
def loaded():
    return huggingface.load(GPT2)


@pytest.fixture(scope='module')
def expected():
    with np.load(GPT2 / 'expected.npz') as made:
        return dict(made)


def same(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), one, other)


def change(directory, **changes):
    path = directory / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_logits_and_greedy_tokens(loaded, expected):
    model, _ = loaded
    ids = expected['ids'].astype(np.int32)
    np.testing.assert_allclose(model(ids), expected['logits'], atol=1e-5)
    made = decoding.generate(model, ids, 32, temperature=0)
    np.testing.assert_array_equal(made, expected['greedy'][:, ids.shape[1] :])


def test_the_tokenizer(loaded, expected):
    _, tokenizer = loaded
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (2, 0, (2, 0))
    assert tokenizer.generation == {'temperature': 0.5, 'top_p': 0.9}
    messages = json.loads((GPT2 / 'messages.json').read_text())
    np.testing.assert_array_equal(tokenizer.encode_chat(messages), expected['chat'])
    np.testing.assert_array_equal(tokenizer.encode('The cat sat'), expected['ids'][0])
    assert tokenizer.decode(expected['greedy'][0]) == str(expected['decoded'])
    assert tokenizer.vocab_size == 280  # and 288 rows in the model, some of them padding


def test_files_of_torch(loaded, directory):
    (directory / 'model.safetensors').unlink()
    shutil.copy(GPT2 / 'pytorch_model.bin', directory)
    model, _ = huggingface.load(directory)
    assert model.layer == loaded[0].layer
    same(model.weights, loaded[0].weights)


def test_names_without_a_prefix(loaded, directory):
    """Files of the model without its head, which hold masks, too."""
    from safetensors.numpy import load_file, save_file

    path = directory / 'model.safetensors'
    tensors = {k.removeprefix('transformer.'): x for k, x in load_file(path).items()}
    tensors['h.0.attn.bias'] = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file(tensors, path)
    same(huggingface.load(directory)[0].weights, loaded[0].weights)


@pytest.mark.parametrize('shard_bytes', [10**9, 15_000])
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_what_is_saved_is_what_is_loaded(loaded, tmp_path, shard_bytes, dtype):
    model, tokenizer = loaded
    sizes = huggingface.save(tmp_path / 'a', model, tokenizer, shard_bytes=shard_bytes, dtype=dtype)
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / 'a').iterdir()}
    assert ('model.safetensors.index.json' in sizes) == (shard_bytes < 10**9)
    again, its_tokenizer = huggingface.load(tmp_path / 'a')
    assert again.layer == model.layer and its_tokenizer == tokenizer
    if dtype is None:
        same(again.weights, model.weights)
        return
    half = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.weights)
    same(again.weights, half)


def test_bfloat16(loaded, directory, tmp_path, expected):
    ids = expected['ids'].astype(np.int32)
    model, _ = huggingface.load(directory, dtype='bfloat16')
    weights = model.weights
    assert weights['embedding']['table'].dtype == 'bfloat16' and 'head' not in weights
    assert weights['norm']['scale'].dtype == 'float32'
    np.testing.assert_allclose(model(ids), expected['logits'], atol=0.3)
    whole = decoding.generate(model, ids, 4, temperature=0)
    assert whole.shape == (1, 4)
    huggingface.save(tmp_path / 'again', model)
    again, tokenizer = huggingface.load(tmp_path / 'again', dtype='bfloat16')
    assert again.layer == model.layer and tokenizer is None
    same(again.weights, weights)


@pytest.mark.parametrize('bits', [8, 16])
def test_narrow_weights_are_widened(loaded, tmp_path, bits, expected):
    ids = expected['ids'].astype(np.int32)
    net, weights = transforms.quantize(loaded[0].layer, loaded[0].weights, bits, 16, smallest=1)
    huggingface.save(tmp_path / 'a', Model(net, weights))
    model, _ = huggingface.load(tmp_path / 'a')
    with layercomb_kernels.off():  # which round activations to 16 bits
        np.testing.assert_allclose(model(ids), Model(net, weights)(ids), atol=1e-4)


def test_a_model_of_bytes(tmp_path):
    """What was trained here, on bytes, goes out with a tokenizer that makes bytes."""
    model = Model(models.GPT2(256, 16, n_layers=1, n_heads=2, max_len=16)).init(
        np.zeros((1, 4), np.int32)
    )
    huggingface.save(tmp_path / 'a', model, data.ByteTokenizer())
    again, tokenizer = interop.load(tmp_path / 'a')
    same(again.weights, model.weights)
    text = 'naïve 你好\n\n  Ā'
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text and tokenizer.eos_id == 0


def test_models_that_cannot_be_saved(loaded, tmp_path):
    model, tokenizer = loaded
    with pytest.raises(UsageError, match='this model belongs to none of the families'):
        huggingface.save(tmp_path / 'a', Model(tl.Dense(2)).init(np.zeros((1, 2), np.float32)))
    with pytest.raises(UsageError, match='this model has no weights'):
        huggingface.save(tmp_path / 'a', Model(model.layer))
    with pytest.raises(UsageError, match='a tokenizer of object cannot be written'):
        huggingface.save(tmp_path / 'a', model, object())
    with pytest.raises(UsageError, match='give float32, bfloat16 or float16'):
        huggingface.save(tmp_path / 'a', model, dtype='int8')
    small = models.GPT2(100, 16, n_layers=1, n_heads=2, max_len=16)
    small = Model(small).init(np.zeros((1, 4), np.int32))
    with pytest.raises(UsageError, match='the tokenizer has 280 tokens and the model 100'):
        huggingface.save(tmp_path / 'a', small, tokenizer)
    assert not any(tmp_path.iterdir())
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'file').touch()
    with pytest.raises(UsageError, match='is there already'):
        huggingface.save(tmp_path / 'b', model)
    assert [p.name for p in tmp_path.rglob('*')] == ['b', 'file']


def test_nothing_is_left_of_what_failed(loaded, tmp_path, monkeypatch):

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(saving, '_write_json', fail)
    with pytest.raises(UsageError, match='No space left on device'):
        huggingface.save(tmp_path / 'a', *loaded)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    'changes, error',
    [
        ({'model_type': 'mamba'}, "a model of type 'mamba', and known are .*gpt2"),
        ({'model_type': None}, 'a model of type None'),
        ({'n_embd': 32}, r'misshapen: transformer.wte.weight is \(288, 16\) and not \(288, 32\)'),
        ({'n_layer': 3}, r'missing: transformer.h.2.ln_1.weight'),
        ({'n_layer': 1}, r'left over: transformer.h.1'),
        ({'n_layer': 10**12}, "'n_layer' is 1000000000000, which no model has"),
        ({'vocab_size': 10**15}, "'vocab_size' is 1000000000000000, which no model has"),
        ({'vocab_size': 100}, 'misshapen|the tokenizer has 280 tokens and the model 100'),
        ({'n_head': 3}, '3 heads do not divide'),
        ({'n_embd': -1}, "'n_embd' is -1"),
        ({'n_embd': 'many'}, "'n_embd' is 'many'"),
        ({'n_embd': 1.5}, "'n_embd' is 1.5"),
        ({'activation_function': 'swiglu'}, "'activation_function' is 'swiglu'"),
        ({'scale_attn_by_inverse_layer_idx': True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ({'rope_theta': 10000}, "'rope_theta': 10000, which is unknown for gpt2"),
        ({'eos_token_id': 'x'}, None),
        ({'tie_word_embeddings': False}, r'missing: lm_head.weight'),
    ],
)
def test_configurations(directory, changes, error):
    change(directory, **changes)
    if error is None:  # generation_config.json says what ends an answer
        huggingface.load(directory)
        return
    with pytest.raises(UsageError, match=error) as e:
        huggingface.load(directory)
    assert '\n' not in str(e.value)


def test_both_ends_of_a_tie_must_be_equal(directory):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / 'model.safetensors')
    tensors['lm_head.weight'] = tensors['transformer.wte.weight']
    save_file(tensors, directory / 'model.safetensors')
    huggingface.load(directory)
    save_file({**tensors, 'lm_head.weight': -tensors['lm_head.weight']},
              directory / 'model.safetensors')  # fmt: skip
    with pytest.raises(UsageError, match='differ'):
        huggingface.load(directory)
    change(directory, tie_word_embeddings=False)
    model, _ = huggingface.load(directory)
    np.testing.assert_array_equal(
        model.weights['head']['kernel'], -model.weights['embedding']['table'].T
    )


def test_directories_that_lack_something(directory, tmp_path):
    with pytest.raises(UsageError, match='is no directory: give that of a model'):
        huggingface.load(tmp_path / 'nothing')
    with pytest.raises(UsageError, match='give float32 or bfloat16'):
        huggingface.load(directory, dtype='int8')
    (directory / 'tokenizer.json').unlink()
    assert huggingface.load(directory)[1] is None
    (directory / 'vocab.txt').touch()
    with pytest.raises(UsageError, match=r'the vocabulary is in vocab.txt, which is not read'):
        huggingface.load(directory)
    (directory / 'model.safetensors').unlink()
    with pytest.raises(UsageError, match='holds no weights'):
        huggingface.load(directory)
    (directory / 'config.json').unlink()
    with pytest.raises(UsageError, match=r'config.json. is not there'):
        huggingface.load(directory)


@pytest.mark.parametrize(
    'index, error',
    [
        ({}, 'has no weight_map'),
        ({'weight_map': []}, 'has no weight_map'),
        ({'weight_map': {'a': 3}}, 'has no weight_map'),
        ({'weight_map': {'a': '../x.safetensors'}}, 'which is no file of tensors beside it'),
        ({'weight_map': {'a': '/etc/passwd'}}, 'which is no file of tensors beside it'),
        ({'weight_map': {'a': 'x.safetensors'}}, 'x.safetensors. is not there'),
        ({'weight_map': {'a': 'one.safetensors'}}, 'does not say that .* is in one.safetensors'),
    ],
)
def test_an_index_that_does_not_fit(directory, index, error):
    (directory / 'model.safetensors').rename(directory / 'one.safetensors')
    (directory / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UsageError, match=error):
        huggingface.load(directory)


def test_a_tensor_that_its_shard_lacks(loaded, tmp_path):
    huggingface.save(tmp_path / 'a', loaded[0], shard_bytes=15_000)
    path = tmp_path / 'a' / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map']['other'] = next(iter(index['weight_map'].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"says that 'other' is in .*, which lacks it"):
        huggingface.load(tmp_path / 'a')


def test_a_model_that_does_not_fit_into_the_memory(monkeypatch):
    from layercomb.interop import memory

    monkeypatch.setattr(memory, 'free_bytes', lambda: 10_000)
    with pytest.raises(UsageError, match=r'takes 0.00 GiB of memory, and 0.00 GiB are free'):
        huggingface.load(GPT2)


def test_special_tokens_in_all_forms(directory):
    path = directory / 'tokenizer_config.json'
    settings = {'eos_token': {'content': '<|im_end|>', 'lstrip': False}, 'bos_token': None}
    path.write_text(json.dumps(settings))
    (directory / 'special_tokens_map.json').write_text('{"bos_token": "<|im_start|>"}')
    _, tokenizer = huggingface.load(directory)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (2, 1)
    for name in ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'):
        (directory / name).unlink()
    _, tokenizer = huggingface.load(directory)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.chat) == (2, None, None)
    (directory / 'generation_config.json').write_text('{"eos_token_id": 77777}')
    with pytest.raises(UsageError, match='no token ends a text'):
        huggingface.load(directory)
    (directory / 'generation_config.json').write_text('{"eos_token_id": [[]]}')
    with pytest.raises(UsageError, match='eos_token_id is'):
        huggingface.load(directory)


def test_a_sentencepiece_model(directory):
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the cat sat on the mat'] * 9),
        model_writer=out, vocab_size=40, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (directory / 'tokenizer.json').unlink()
    (directory / 'generation_config.json').unlink()
    (directory / 'spiece.model').write_bytes(out.getvalue())
    settings = {'eos_token': '</s>', 'tokenizer_class': 'T5Tokenizer', 'extra_ids': 3}
    (directory / 'tokenizer_config.json').write_text(json.dumps(settings))
    _, tokenizer = huggingface.load(directory)
    assert tokenizer.eos_id == 1 and tokenizer.encode('the cat')[-1] == 1
    plain = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    assert tokenizer.encode('the <extra_id_0>').tolist() == [
        *plain.encode('the '), plain.get_piece_size() + 2, 1,
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode('the cat <extra_id_0>')) == 'the cat'
    settings['tokenizer_class'] = 'AlbertTokenizer'
    (directory / 'tokenizer_config.json').write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r'is in spiece.model for a .?AlbertTokenizer'):
        huggingface.load(directory)


FILES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
         'model.safetensors', 'chat_template.jinja')  # fmt: skip


@given(st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_directories(tmp_path, data):
    """A damaged file is refused in one line, or the model is loaded."""
    name = data.draw(st.sampled_from(FILES))
    target = tmp_path / 'damaged'
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(GPT2, target, ignore=shutil.ignore_patterns(*LARGE))
    made = bytearray((GPT2 / name).read_bytes())
    if data.draw(st.booleans()):
        made = made[: data.draw(st.integers(0, len(made) - 1))]
    else:
        at = data.draw(st.integers(0, min(len(made), 4000) - 1))
        made[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0{}[]",:a9-'))
    (target / name).write_bytes(made)
    try:
        huggingface.load(target)
    except UsageError as e:
        assert '\n' not in str(e)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_transformers_reads_what_is_saved(loaded, expected, tmp_path, dtype):
    pytest.importorskip('torch')
    pytest.importorskip('transformers')
    huggingface.save(tmp_path / 'a', *loaded, dtype=dtype, shard_bytes=15_000)
    code = (
        'import sys, json, torch, numpy as np, transformers as t\n'
        'd, out = sys.argv[1:]; given = np.load(d + "/../expected.npz")\n'
        'net = t.AutoModelForCausalLM.from_pretrained(d, dtype="float32").eval()\n'
        'words = t.AutoTokenizer.from_pretrained(d)\n'
        'messages = json.loads(open(d + "/../messages.json").read())\n'
        'chat = words.apply_chat_template(messages, add_generation_prompt=True)\n'
        'chat = chat["input_ids"] if hasattr(chat, "keys") else chat\n'
        'with torch.no_grad(): logits = net(torch.tensor(given["ids"])).logits.numpy()\n'
        'ends = net.generation_config.eos_token_id\n'
        'ids = words("The cat sat")["input_ids"]\n'
        'np.savez(out, logits=logits, chat=chat, ids=ids, ends=ends)\n'
    )
    for name in ('expected.npz', 'messages.json'):
        shutil.copy(GPT2 / name, tmp_path)
    command = [sys.executable, '-c', code, str(tmp_path / 'a'), str(tmp_path / 'out.npz')]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(tmp_path / 'out.npz') as made:
        tolerance = 1e-4 if dtype is None else 0.3
        np.testing.assert_allclose(made['logits'], expected['logits'], atol=tolerance)
        np.testing.assert_array_equal(made['chat'], expected['chat'])
        np.testing.assert_array_equal(made['ids'], expected['ids'][0])
        assert made['ends'].tolist() == [2, 0]


def test_no_more_than_one_weight_is_wide_at_a_time(loaded, monkeypatch):
    net, weights = transforms.quantize(loaded[0].layer, loaded[0].weights, 8, 16, smallest=1)
    wide = hold_wide(net)
    family, config = config_of(wide)
    made = saving.widened(net, wide, weights, family.signature(wide))
    alive = []

    def counted(*args):
        turned = np.ones(args[0].shape, np.float32)
        alive.append(weakref.ref(turned))
        assert sum(each() is not None for each in alive) <= 3  # of queries, keys and values
        return turned

    monkeypatch.setattr(saving.Widened, '__array__', counted)
    for _ in spill(wide, made, family.entries(Config(config))):
        pass
    assert len(alive) > 6
