"""What was trained and exported before the layers moved into rooms still works.

tests/data/old has an archive a model: `run`, the directory of four steps of training, and `export`.
``expected.json`` has what the code of that time made of them: losses of an evaluation and of four
more steps, and the text it wrote. These files are never made anew.
"""

import json
import re
import tarfile
from pathlib import Path

import pytest

from layercomb import cli
from layercomb.interop.safetensors import load_weights
from layercomb.supervised import decoding

OLD = Path(__file__).parent / 'data/old'
EXPECTED = json.loads((OLD / 'expected.json').read_text())
EXPORTED = ('transformer', 'reformer', 'terraformer_lm')


@pytest.fixture
def old(tmp_path):
    """Unpacks the archive of a model."""

    def unpack(model):
        with tarfile.open(OLD / f'{model}.tar.xz') as archive:
            archive.extractall(tmp_path, filter='data')
        return tmp_path

    return unpack


@pytest.mark.parametrize('model', EXPECTED)
def test_an_old_run_is_measured_and_writes_as_it_did(model, old, capsys):
    run = str(old(model) / 'run')
    assert cli.main(['eval', run]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    measured = {name: float(value) for name, value in rows}
    assert measured == pytest.approx(EXPECTED[model]['eval'], rel=1e-4)
    if 'generated' in EXPECTED[model]:
        how = ['--prompt', 'abcab', '--n_tokens', '10', '--temperature', '0']
        assert cli.main(['generate', run, *how]) == 0
        assert capsys.readouterr().out == bytes(EXPECTED[model]['generated']).decode()


# The encoder-decoder takes as long as all others; it is measured and writes in the test above.
SLOW = {'terraformer': pytest.mark.slow}


@pytest.mark.filterwarnings('ignore:the checkpoint was made by')  # of another version of JAX
@pytest.mark.parametrize('model', [pytest.param(m, marks=SLOW.get(m, ())) for m in EXPECTED])
def test_an_old_run_goes_on_as_it_would_have(model, old, capsys):
    run = old(model) / 'run'
    config = old(model) / f'{model}.gin'
    config.write_text((run / 'config.gin').read_text())
    command = ['train', str(config), '--output_dir', str(run), '--gin_param', 'train.steps=8']
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    losses = {str(row['step']): row['train/loss'] for row in rows if row['step'] > 4}
    assert losses == pytest.approx(EXPECTED[model]['losses'], rel=1e-4)


@pytest.mark.parametrize('model', EXPORTED)
def test_an_old_export_decodes_as_its_run_does(model, old, monkeypatch):
    export = old(model) / 'export'
    run, _ = cli.trained(str(old(model) / 'run'))
    assert load_weights(export / 'model.safetensors').keys() == run.weights.keys()
    monkeypatch.chdir(export)
    (code,) = re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.DOTALL)
    session: dict = {}
    exec(code, session)
    prompt = list(b'abcab')
    wanted = decoding.generate(run, [prompt], 10, temperature=0)[0].tolist()
    assert session['continued'](prompt, 10) == wanted
