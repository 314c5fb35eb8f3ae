"""Makes tests/data/trax: checkpoints that Trax 1.4.1 wrote, and what its models answer.

Trax needs an old JAX, and TensorFlow for files only, which `_stubs` replaces. Once, anywhere::

    python3.9 -m venv trax && trax/bin/pip install jax==0.4.13 jaxlib==0.4.13 numpy==1.24.4 \
        scipy==1.10.1 gin-config absl-py six psutil
    trax/bin/pip download --no-deps trax==1.4.1 && unzip -d source trax-1.4.1-*.whl
    trax/bin/python tests/data/make_trax.py source tests/data/trax

Every directory holds what a run of Trax left, and ``expected.npz``: tokens, logits and, if there
are any, greedy continuations.
"""

import importlib.abc
import importlib.machinery
import json
import os
import pathlib
import sys
import types

SOURCE, OUT = sys.argv[1], pathlib.Path(sys.argv[2])

COMMON = """
train.steps = 30
train.eval_steps = 1
train.eval_frequency = 30
train.random_seed = 0
train.inputs = @make.inputs
train.optimizer = @trax.optimizers.Adam
train.lr_schedule_fn = @make.rate
"""

RUNS = {
    'lm': """
        train.model = @trax.models.TransformerLM
        TransformerLM.vocab_size = 20
        TransformerLM.d_model = 8
        TransformerLM.d_ff = 12
        TransformerLM.n_layers = 2
        TransformerLM.n_heads = 2
        TransformerLM.max_len = 80
        TransformerLM.dropout = 0.1
        TransformerLM.ff_activation = @trax.layers.Gelu
        """,
    'seq2seq': """
        train.model = @trax.models.Transformer
        Transformer.input_vocab_size = 20
        Transformer.d_model = 8
        Transformer.d_ff = 12
        Transformer.n_encoder_layers = 1
        Transformer.n_decoder_layers = 2
        Transformer.n_heads = 2
        Transformer.max_len = 24
        make.inputs.source = True
        """,
    'seq2seq_two_vocabularies': """
        train.model = @trax.models.Transformer
        Transformer.input_vocab_size = 22
        Transformer.output_vocab_size = 20
        Transformer.d_model = 8
        Transformer.d_ff = 12
        Transformer.n_encoder_layers = 2
        Transformer.n_decoder_layers = 1
        Transformer.n_heads = 4
        Transformer.max_len = 24
        make.inputs.source = True
        """,
    'reformer': """
        train.model = @trax.models.ReformerLM
        ReformerLM.vocab_size = 20
        ReformerLM.d_model = 8
        ReformerLM.d_ff = 12
        ReformerLM.d_attention_key = 6
        ReformerLM.d_attention_value = 4
        ReformerLM.n_layers = 2
        ReformerLM.n_heads = 2
        ReformerLM.max_len = 16
        ReformerLM.attention_type = [@trax.layers.SelfAttention, @trax.layers.LSHSelfAttention]
        ReformerLM.pos_type = 'axial'
        ReformerLM.pos_axial_shape = (4, 4)
        ReformerLM.pos_d_axial_embs = (3, 5)
        LSHSelfAttention.chunk_len = 16
        LSHSelfAttention.n_hashes = 2
        SelfAttention.chunk_len = 4
        SelfAttention.n_chunks_before = 1
        SelfAttention.bias = True
        """,
}


class _Stub(types.ModuleType):
    """A module whose every attribute is an empty class."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what Trax imports and these models never use."""

    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('tensorflow', 'tensorflow_datasets', 'tensorflow_text', 't5'):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


class _Silent:
    """A writer of summaries that writes none."""

    def __init__(self, *_):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def _stubs():
    sys.meta_path.insert(0, _Stubs())
    sys.path.insert(0, SOURCE)
    import tensorflow

    tensorflow.random = types.SimpleNamespace(set_seed=lambda seed: None)
    tensorflow.io = types.SimpleNamespace(
        gfile=types.SimpleNamespace(
            GFile=open,
            exists=os.path.exists,
            isdir=os.path.isdir,
            makedirs=lambda path: os.makedirs(path, exist_ok=True),
            rename=lambda old, new, overwrite: os.replace(old, new),
        )
    )
    for name in ('trax', 'trax.data', 'trax.models', 'trax.supervised', 'trax.rl'):
        module = types.ModuleType(name)  # without the imports of its __init__.py
        module.__path__ = [os.path.join(SOURCE, *name.split('.'))]
        sys.modules[name] = module
    backend = types.ModuleType('trax.fastmath.tf')
    backend.TF_BACKEND = {'name': 'tf'}
    board = types.ModuleType('trax.jaxboard')
    board.SummaryWriter, board.markdownify_operative_config_str = _Silent, str
    sys.modules['trax.fastmath.tf'] = backend
    sys.modules['trax.jaxboard'] = sys.modules['trax'].jaxboard = board


_stubs()

import gin  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from trax import fastmath, shapes  # noqa: E402
from trax import layers as tl  # noqa: E402
from trax.data import inputs as trax_inputs  # noqa: E402
from trax.models import transformer  # noqa: E402
from trax.models.reformer import reformer  # noqa: E402
from trax.supervised import trainer_lib  # noqa: E402

B, S, L, V = 2, 9, 16, 20


def _batches(source):
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(2, V, (B, L)).astype(np.int32)
        tokens[:, 1::2] = tokens[:, ::2] // 2 + 1
        weights = np.ones((B, L), np.float32)
        yield (tokens[:, :S], tokens, weights) if source else (tokens, tokens, weights)


@gin.configurable(module='make')
def inputs(source=False):
    """Sequences in which every second token follows from the first."""
    return trax_inputs.Inputs(lambda n_devices: _batches(source))


@gin.configurable(module='make')
def rate():
    """A learning rate that changes all weights visibly."""
    return lambda step: 0.02


MODELS = {
    model.__name__: gin.external_configurable(model, module='trax.models')
    for model in (transformer.TransformerLM, transformer.Transformer, reformer.ReformerLM)
}


def _model(text, folder, given):
    """The model of a run, with its weights, for inputs like those given."""
    model = MODELS[text.split('@trax.models.')[1].split()[0]](mode='eval')
    made = tuple(map(shapes.signature, given))
    model.init_from_file(str(folder / 'model.pkl.gz'), True, made if len(made) > 1 else made[0])
    model.weights = jax.tree_util.tree_map(jax.numpy.asarray, model.weights)
    return model


def _tokens(text):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, V, (B, L)).astype(np.int32)
    if 'make.inputs.source' not in text:
        return (tokens,)
    source = rng.integers(1, V, (B, S)).astype(np.int32)
    source[1, 6:] = 0  # padding
    return source, tokens


def _logits(model, given):
    out = model(given if len(given) > 1 else given[0])
    return np.asarray(out[0] if isinstance(out, (tuple, list)) else out)


def _greedy(model, given):
    """Tokens of highest logits, each after those before it."""
    made = given[-1].copy()
    for t in range(made.shape[1]):
        made[:, t] = _logits(model, (*given[:-1], made))[:, t].argmax(-1)
    return made


def run(name, text):
    """Trains a model, and keeps its checkpoint, config and answers."""
    folder = OUT / name
    text = COMMON + '\n'.join(line.strip() for line in text.splitlines())
    gin.clear_config()
    gin.parse_config(text)
    trainer_lib.train(str(folder))
    for path in folder.iterdir():
        if path.name not in ('model.pkl.gz', 'model.weights.npy.gz', 'config.gin'):
            path.unlink()
    given = _tokens(text)
    logits = _logits(_model(text, folder, given), given)
    longer = (*given[:-1], np.zeros((B, 64 if name == 'lm' else L), np.int32))
    greedy = _greedy(_model(text, folder, longer), longer)
    named = {'tokens': given[-1], **({'source': given[0]} if len(given) > 1 else {})}
    np.savez_compressed(folder / 'expected.npz', logits=logits, greedy=greedy, **named)


def whole_pickle():
    """A model saved by itself: weights in the pickle, learned positions, causal attention."""
    gin.clear_config()
    folder = OUT / 'saved'
    folder.mkdir(exist_ok=True)
    model = reformer.ReformerLM(
        V, 8, 12, n_layers=1, n_heads=2, max_len=L, attention_type=tl.CausalAttention, mode='eval'
    )
    (tokens,) = _tokens('')
    model.init(shapes.signature(tokens), rng=fastmath.random.get_prng(0))
    rng = np.random.default_rng(3)
    model.weights = jax.tree_util.tree_map(
        lambda w: w + 0.2 * rng.standard_normal(w.shape).astype(np.float32), model.weights
    )
    model.save_to_file(str(folder / 'model.pkl.gz'), input_signature=shapes.signature(tokens))
    np.savez_compressed(folder / 'expected.npz', logits=_logits(model, (tokens,)), tokens=tokens)


def lsh_layer():
    """One LSH attention of several chunks, with the buckets it drew."""
    gin.clear_config()
    layer = tl.LSHSelfAttention(
        n_heads=2, d_qk=6, d_v=4, causal=True, chunk_len=4, n_hashes=1, n_buckets=4, mode='eval'
    )
    x = np.random.default_rng(2).standard_normal((B, L, 8)).astype(np.float32)
    layer.init(shapes.signature(x), rng=fastmath.random.get_prng(1))
    y = layer(jax.numpy.asarray(x))
    query, value, output = (np.asarray(w) for w in layer.weights)
    np.savez_compressed(
        OUT / 'lsh_layer.npz',
        x=x,
        y=np.asarray(y),
        query=query,
        value=value,
        output=output,
        buckets=np.asarray(layer.state[0]),
    )


def subwords():
    """A vocabulary, texts, and their ids."""
    from trax.data import text_encoder

    alphabet = '\\\\_u;0123456789abcdefghijklmnopqrstuvwxyzTHé .,-\'"'
    words = ['<pad>_', '<EOS>_', 'the_', 'he', 'th', 'ing_', ', _', ' - _', 'und', '._']
    (OUT / 'tiny.subword').write_text(
        '\n'.join(f"'{word}'" for word in [*words, *alphabet]) + '\n', encoding='utf-8'
    )
    encoder = text_encoder.SubwordTextEncoder(str(OUT / 'tiny.subword'))
    texts = [
        'The thing, he said - understanding.',
        ' two  blanks, é and ß and 字;\ta_b\\c\n"end" ',
        '',
        ' ',
        'a b',
        "12'34 & 56 _",
    ]
    made = [(text, [int(i) for i in encoder.encode(text)]) for text in texts]
    assert all(encoder.decode(ids) == text for text, ids in made)
    (OUT / 'tiny.subword.json').write_text(json.dumps(made, ensure_ascii=True, indent=1))


if __name__ == '__main__':
    print('jax', jax.__version__)
    for name, text in RUNS.items():
        run(name, text)
    whole_pickle()
    lsh_layer()
    subwords()
