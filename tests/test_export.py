"""An exported model: what is in the files is what decodes here, and nothing half-written stays."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import export, models, tl, trees
from layercomb.errors import UsageError
from layercomb.interop.safetensors import load_weights, save_weights
from layercomb.supervised import decoding

V = 32
LOCAL_AND_LSH = (tl.LocalSelfAttention(2, chunk_len=8), tl.LSHSelfAttention(2, chunk_len=8))
NETS = {
    'dense': models.TransformerLM(V, d_model=8, d_ff=16, n_layers=2, n_heads=2, max_len=24),
    'hashed': models.ReformerLM(V, 8, 16, 2, 2, max_len=24, attention=LOCAL_AND_LSH),
    'sparse': models.TerraformerLM(
        V, 8, 32, 2, 2, max_len=24, ff_block_size=8, qkv_modules=4, head_modules=4
    ),
    'mixture': models.ReformerLM(
        V, 8, 16, 2, 2, max_len=24, attention=tl.SelfAttention(2), ff=tl.MixtureFF(32, 8, 2)
    ),
    'shared': tl.Serial(
        tl.Embedding(V, 8),
        tl.Repeat(tl.Repeat(tl.Residual(tl.SelfAttention(2)), 2), 2),
        tl.Repeat(tl.Residual(tl.Dense(8)), 2, shared=True),
        tl.Dense(V),
    ),
    'tied': models.Llama(V, 8, 16, 2, 2, 1, max_len=24, tied=True),
    'statistics': tl.Serial(tl.Embedding(V, 8), tl.BatchNorm(), tl.Dense(V)),
}


def made(net):
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), rng=3)
    shifted = jax.tree.map(lambda x: x + 0.5 if x.dtype == jnp.float32 else x, model.state)
    return lc.Model(net, model.weights, shifted)  # statistics as of some training


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in ('hashed', 'shared'))) for n in NETS]
)
def test_the_readme_decodes_as_the_library_does(name, tmp_path, monkeypatch):
    model = made(NETS[name])
    written = export.write(model, tmp_path / 'out', 'a = 1\n', batch_size=2, max_len=20)
    assert written['model.safetensors'] > trees.n_bytes(model.weights)
    monkeypatch.chdir(tmp_path / 'out')
    assert (tmp_path / 'out/config.gin').read_text() == 'a = 1\n'
    (code,) = re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.DOTALL)
    session: dict = {}
    exec(code, session)
    prompt = [5, 9, 1]
    wanted = decoding.generate(model, [prompt], 12, temperature=0)[0].tolist()
    assert session['continued'](prompt, 12) == wanted


def test_programs_do_not_say_where_their_source_was():
    for program in export.decode_programs(made(NETS['hashed'])).values():
        assert not re.search(rb'\w+\.py|layercomb/', bytes(program.serialize()))


def test_weights_are_read_back(tmp_path):
    model = made(NETS['statistics'])
    export.write(model, tmp_path, '')
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(tmp_path / 'model.safetensors'), model.weights
    )
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(tmp_path / 'state.safetensors'), model.state
    )
    layout = json.loads((tmp_path / 'decode_step.json').read_text())
    assert layout['platforms'] == ['cpu', 'cuda', 'tpu'] and layout['max_len'] == 1024
    assert layout['logits'] == {'shape': [1, V], 'dtype': 'float32'}


def test_safetensors_keep_narrow_types_and_views(tmp_path):
    tree = {
        'a': {'kernel': jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), 'q': jnp.int8([1, -2])},
        'b': np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
    }
    save_weights(tmp_path / 'x.safetensors', tree)
    back = load_weights(tmp_path / 'x.safetensors')
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(back))  # layers index with arrays


def test_what_is_no_safetensors_is_named(tmp_path):
    with pytest.raises(UsageError, match=r'No such file .*nothing'):
        load_weights(tmp_path / 'nothing')
    (tmp_path / 'x').write_bytes(b'no weights at all')
    with pytest.raises(UsageError, match='is no file of safetensors'):
        load_weights(tmp_path / 'x')


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    model = made(NETS['statistics'])
    monkeypatch.setattr(export, '_readme', full)
    with pytest.raises(UsageError, match='No space left on device: free some space'):
        export.write(model, tmp_path / 'out', '')
    assert not list(tmp_path.iterdir())


def test_mistakes(tmp_path):
    model = made(NETS['dense'])
    (tmp_path / 'letter').write_text('dear')
    with pytest.raises(UsageError, match='is not empty: export to a new directory'):
        export.write(model, tmp_path, '')
    with pytest.raises(UsageError, match=r'not empty'):
        export.write(model, tmp_path / 'letter', '')
    with pytest.raises(UsageError, match="max_len=25 is more than the model's 24"):
        export.write(model, tmp_path / 'out', '', max_len=25)
    for wrong in ({'max_len': 0}, {'batch_size': 0}):
        with pytest.raises(ValueError, match='must be at least 1, got 0'):
            export.write(model, tmp_path / 'out', '', **wrong)
    pair = tl.Serial(tl.Fn('Sum', lambda x, y: x + y), tl.Embedding(V, 8))
    with pytest.raises(UsageError, match='this one has 2 inputs'):
        export.decode_programs(lc.Model(pair, {}, {}))
    assert [path.name for path in tmp_path.iterdir()] == ['letter']


def test_scalars_stay_scalars(tmp_path):
    save_weights(tmp_path / 'w.safetensors', {'gain': np.float32(2.0)})
    assert load_weights(tmp_path / 'w.safetensors')['gain'].shape == ()
