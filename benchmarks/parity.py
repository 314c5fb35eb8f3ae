"""Models of other libraries beside the same models here, on random weights.

    pip install -e '.[bench,pretrained]'
    python benchmarks/parity.py [llama qwen3 …] [--peer PYTHON]

transformers makes a small model of each kind and writes it as a directory. Ours reads it with
`huggingface.load`, all in float32 on the CPU. A line a kind says:

* logits: the largest difference between ours and transformers', beside the largest logit;
* greedy: how many of 64 tokens are the same, decoded by both with their caches;
* bitwise: whether load → save → load gives the same model and the same weights, bit for bit;
* back: the largest difference between logits of transformers on what we saved and on the original.

It ends with status 1 if logits differ by more than 1e-4, or anything else at all. `--peer` is a
Python that has torch and transformers, if this one has not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LENGTH, N_TOKENS, TOLERANCE = 48, 64, 1e-4
PEER = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TQDM_DISABLE': '1'}
SIZES = {
    'vocab_size': 331,
    'hidden_size': 64,
    'intermediate_size': 160,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'max_position_embeddings': 256,
}
SHARED = {**SIZES, 'num_key_value_heads': 2}
GEMMA = {**SHARED, 'head_dim': 32, 'sliding_window': 16, 'num_hidden_layers': 7}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 500000.0,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model to compare.

    Attributes:
      model_type: of its config.json.
      entries: of its configuration.
      auto: the class of transformers that makes it; its first output is compared.
      decodes: whether it makes tokens one after the other.
    """

    model_type: str
    entries: dict[str, Any]
    auto: str = 'AutoModelForCausalLM'
    decodes: bool = True


ROWS = {
    'llama': Row('llama', SHARED),
    'llama 3': Row('llama', {**SHARED, 'rope_parameters': LLAMA3, 'tie_word_embeddings': True}),
    'mistral': Row('mistral', {**SHARED, 'sliding_window': 16}),
    'qwen2': Row('qwen2', {**SHARED, 'tie_word_embeddings': True}),
    'qwen3': Row('qwen3', {**SHARED, 'head_dim': 32}),
    'gemma2': Row('gemma2', {**GEMMA, 'query_pre_attn_scalar': 24}),
    'gemma3': Row('gemma3_text', {**GEMMA, 'sliding_window_pattern': 3}),
    'phi3': Row('phi3', {**SHARED, 'pad_token_id': 0}),
    'gpt2': Row(
        'gpt2', {'vocab_size': 331, 'n_embd': 64, 'n_layer': 4, 'n_head': 4, 'n_positions': 256}
    ),
}


# The side of transformers: this file, run by the peer.


def peer_model(row):
    """A model with random weights, none of which is near to nothing."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(row.model_type, **row.entries)
    model = getattr(transformers, row.auto).from_config(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            drawn = torch.randn(w.shape, generator=rng)
            if w.ndim == 1:
                w.add_(0.1 * drawn)  # norms keep their ones
            else:
                w.copy_(drawn if 'emb' in name or '.wte' in name else drawn * w.shape[-1] ** -0.5)
    return model


def peer_logits(model, ids):
    """(1, L, V) float32 of ids (1, L)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64)))[0].numpy()


def peer_makes(folder, names):
    """Writes the models, their logits, and the tokens that they make."""
    import torch

    for name in names:
        row = ROWS[name]
        model = peer_model(row)
        ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, LENGTH))
        made = {'ids': ids.astype(np.int32), 'logits': peer_logits(model, ids)}
        if row.decodes:
            prompt = torch.tensor(ids)
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=N_TOKENS,
                min_new_tokens=N_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            made['tokens'] = tokens[:, LENGTH:].numpy()
        model.save_pretrained(folder / name)
        np.savez(folder / name / 'expected.npz', **made)


def peer_reads(folder, names):
    """Reads what we saved, and writes its logits."""
    import transformers

    for name in names:
        again = folder / name / 'again'
        model = getattr(transformers, ROWS[name].auto).from_pretrained(again).eval()
        with np.load(folder / name / 'expected.npz') as given:
            np.save(again / 'logits.npy', peer_logits(model, given['ids']))


# Ours.


def compared(folder, name):
    """The figures of a model, and whether they are right; it is saved to be read back."""
    import jax

    from layercomb.interop import huggingface
    from layercomb.layers.core.mode import Mode
    from layercomb.supervised import decoding

    row, directory = ROWS[name], folder / name
    model, _ = huggingface.load(directory)
    with np.load(directory / 'expected.npz') as given:
        expected = dict(given)
    apply = jax.jit(model.layer.apply, static_argnames='mode')
    (logits, *_), _ = apply(model.weights, model.state, (expected['ids'],), mode=Mode.EVAL)
    found = {
        'difference': float(np.abs(logits - expected['logits']).max()),
        'largest': float(np.abs(expected['logits']).max()),
    }
    if row.decodes:
        made = decoding.generate(model, expected['ids'], N_TOKENS, temperature=0.0)
        found['same'] = int((made == expected['tokens']).sum())
    huggingface.save(directory / 'again', model)
    again, _ = huggingface.load(directory / 'again')
    same = jax.tree.map(np.array_equal, model.weights, again.weights)
    found['bitwise'] = again.layer == model.layer and all(jax.tree.leaves(same))
    return found


def line(name, found, back):
    """A line for people, and whether all is right."""
    same, bitwise = found.get('same'), found['bitwise']
    right = found['difference'] <= TOLERANCE and same in (None, N_TOKENS) and bitwise
    right = right and back <= TOLERANCE
    greedy = '' if same is None else f'{same}/{N_TOKENS}'
    text = (
        f'{name:<12} {found["difference"]:9.1e} of {found["largest"]:5.1f} {greedy:>8} '
        f'{"yes" if bitwise else "NO":>9} {back:9.1e}   {"right" if right else "WRONG"}'
    )
    return text, right


def main():
    """Compares the models named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*', help=f'of {", ".join(ROWS)}')
    parser.add_argument('--peer', default=sys.executable, help='a Python that has transformers')
    parser.add_argument('--as_peer', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.names or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f'no {", ".join(unknown)}: there are {", ".join(ROWS)}')
    if args.as_peer:
        task, folder = args.as_peer
        {'make': peer_makes, 'read': peer_reads}[task](Path(folder), names)
        return
    with tempfile.TemporaryDirectory() as made:

        def ask(task):
            command = [args.peer, __file__, *names, '--as_peer', task, made]
            environment = {**os.environ, **PEER}
            subprocess.run(command, check=True, env=environment)

        ask('make')
        results = {name: compared(Path(made), name) for name in names}
        ask('read')
        print(f'{"":<12} {"logits":>9} {"":>8} {"greedy":>8} {"bitwise":>9} {"back":>9}')
        all_right = True
        for name, found in results.items():
            with np.load(Path(made) / name / 'expected.npz') as given:
                difference = np.load(Path(made) / name / 'again' / 'logits.npy') - given['logits']
            text, right = line(name, found, float(np.abs(difference).max()))
            all_right = all_right and right
            print(text)
    sys.exit(not all_right)


if __name__ == '__main__':
    main()
