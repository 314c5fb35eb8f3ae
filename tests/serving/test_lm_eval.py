"""lm_eval measures a served model: tasks of a local file, counted by the server's tokenizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_serving import LIMITS, model, served  # noqa: F401

import layercomb as lc
from layercomb import serving
from layercomb.data import ByteTokenizer

_BESIDE = shutil.which('lm_eval', path=str(Path(sys.executable).parent))
LM_EVAL = _BESIDE or shutil.which('lm_eval')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LM_EVAL is None, reason='no lm_eval: pip install lm-eval[api]'),
]

ROWS = [
    {'asked': 'The cat', 'choices': [' sat', ' né€'], 'gold': 0},
    {'asked': 'A dog ran after', 'choices': ['!', ' the cat'], 'gold': 1},
    {'asked': 'é', 'choices': ['a', 'b', 'cd'], 'gold': 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: {kind}
{more}
"""
TASKS = {
    'chosen': (
        'multiple_choice',
        'doc_to_text: "{{asked}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc',
    ),
    'rolled': (
        'loglikelihood_rolling',
        'doc_to_text: ""\ndoc_to_target: "{{asked}}"\nmetric_list:\n  - metric: bits_per_byte',
    ),
    'made': (
        'generate_until',
        'doc_to_text: "{{asked}}"\ndoc_to_target: "x"\n'
        'generation_kwargs:\n  until: ["\\n\\n", "a", "b", "c", "d"]\n  max_gen_toks: 5\n'
        'metric_list:\n  - metric: exact_match',
    ),
}


def likelihood(net, text, rest):
    """log p of a rest behind a text, and whether it is the likeliest, by hand."""
    start, ids = len(text.encode()), np.array([*(text + rest).encode()], np.int32)
    logits, _ = net.layer.apply(net.weights, net.state, (ids[None],), mode=lc.Mode.EVAL)
    logprobs = np.asarray(jax.nn.log_softmax(logits[0][0].astype(jnp.float32)))
    places = range(start - 1, len(ids) - 1)
    each = [logprobs[t, ids[t + 1]] for t in places]
    return float(sum(each)), all(logprobs[t].argmax() == ids[t + 1] for t in places)


def measured(address, folder):
    """What lm_eval writes: samples by the name of the task."""
    rows = folder / 'rows.jsonl'
    rows.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
    for name, (kind, more) in TASKS.items():
        task = TASK.format(name=name, rows=rows, kind=kind, more=more)
        (folder / f'{name}.yaml').write_text(task)
    host, port = address
    where = f'model=tiny,base_url=http://{host}:{port}/v1/completions,auth_token=k-1'
    how = f'{where},max_retries=1,num_concurrent=2,max_length=400'
    done = subprocess.run(
        [
            LM_EVAL, '--model', 'local-completions', '--model_args', how,
            '--tasks', ','.join(TASKS), '--include_path', folder, '--output_path', folder / 'out',
            '--log_samples', '--batch_size', '2',
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=folder,
        env={
            **os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(folder / 'home'),
            'OPENAI_API_KEY': 'k-1',
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    samples = {}
    for name in TASKS:
        (file,) = (folder / 'out').rglob(f'samples_{name}_*.jsonl')
        found = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = sorted(found, key=lambda sample: sample['doc_id'])
    return samples


def test_lm_eval_measures_what_the_model_says(model, tmp_path):  # noqa: F811
    application = serving.app(model, ByteTokenizer(), 'tiny', LIMITS, api_key='k-1')
    with served(application) as address:
        samples = measured(address, tmp_path)
    for row, sample in zip(ROWS, samples['chosen'], strict=True):
        for choice, said in zip(row['choices'], sample['filtered_resps'], strict=True):
            logprob, is_likeliest = likelihood(model, row['asked'], choice)
            assert float(said[0]) == pytest.approx(logprob, abs=1e-3)
            assert str(said[1]) == str(is_likeliest)
    for row, sample in zip(ROWS, samples['rolled'], strict=True):
        wanted, _ = likelihood(model, '\0', row['asked'])  # a text begins behind the end of one
        assert float(np.ravel(sample['filtered_resps'])[0]) == pytest.approx(wanted, abs=1e-3)
    for sample in samples['made']:
        (text,) = sample['filtered_resps']
        assert len(text) <= 5 and not set(text) & set('abcd')
