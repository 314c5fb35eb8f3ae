"""Decoding on a CPU, beside Hugging Face's GPT-2 and Reformer and the bandwidth of the memory.

    pip install -e '.[bench]'
    python benchmarks/decode.py [gpt2 reformer prompt 800m] [--repeats 5] [--tokens 16]

Random weights, batch 1, greedy. Ours is `decoding.stream` as it is, on unstacked weights;
Hugging Face's models run with their caches, on torch. Contestants are warm processes that take
turns, 16 tokens each, and the fastest turn counts, in wall time and in CPU seconds of all threads.

The ceiling is the bytes of weights that a token reads over the bandwidth at which XLA multiplies a
vector by a matrix of 1 GiB, measured in turns with the rest.

* gpt2: GPT-2's shape, 124M weights, after 64 tokens; ours with float32, bfloat16, int8 and int4.
* reformer: 12 layers of LSH attention, d_model 768, 12 heads, d_ff 3072, 4 hashes, chunks of 64,
  194M weights, after 64, 1,024, 4,096 and 32,768 tokens.
* prompt: the Reformers reading 4,096 tokens, and the first token after it.
* 800m: 24 layers, d_model 1024, d_ff 4096 (`sparse_decode.py` has its parts one by one).
"""

from __future__ import annotations

import argparse
import time

from machine import describe
from turns import HUGE_PAGES, KEEP_PAGES, TORCH, serve, take_turns

VOCAB, D_MODEL, D_FF, LAYERS, HEADS = 50257, 768, 3072, 12, 12
CHUNK, HASHES, MAX_LEN = 64, 4, 65536
PEER = {**TORCH, **KEEP_PAGES}  # the allocator that suits it
SPARSE = {'ff_block_size': 64, 'qkv_modules': 16, 'head_modules': 4}
DENSE = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}
GPT2 = {
    'Hugging Face': ('peer gpt2 32 64', PEER),
    'Hugging Face, bfloat16': ('peer gpt2 16 64', PEER),
    'ours': ('ours gpt2 32 64', HUGE_PAGES),
    'ours, bfloat16': ('ours gpt2 16 64', HUGE_PAGES),
    'ours, int8': ('ours gpt2 8 64', HUGE_PAGES),
    'ours, int4': ('ours gpt2 4 64', HUGE_PAGES),
}
REFORMER = {
    **{f'Hugging Face, {n:,}': (f'peer reformer 32 {n}', PEER) for n in (64, 4096)},
    **{f'ours, {n:,}': (f'ours reformer 32 {n}', HUGE_PAGES) for n in (64, 1024, 4096, 32768)},
    'ours, 4,096, int8': ('ours reformer 8 4096', HUGE_PAGES),
}
PROMPT = {
    'Hugging Face': ('peer reformer-prompt 32 4096', PEER),
    'ours': ('ours reformer-prompt 32 4096', HUGE_PAGES),
}
LARGE = {
    'dense': ('ours 800m-dense 32 64', HUGE_PAGES),
    'dense, int8': ('ours 800m-dense 8 64', HUGE_PAGES),
    'dense, int4': ('ours 800m-dense 4 64', HUGE_PAGES),
    'sparse': ('ours 800m-sparse 32 64', HUGE_PAGES),
    'sparse, int8': ('ours 800m-sparse 8 64', HUGE_PAGES),
}
BANDWIDTH = {'bandwidth': ('bandwidth - - -', {})}


def our_model(kind):
    """One of ours, and which of its weights a token reads: path → share."""
    from layercomb import models

    if kind == 'gpt2':
        return models.TransformerLM(VOCAB, D_MODEL, D_FF, LAYERS, HEADS, max_len=1024)
    if kind.startswith('800m'):
        sparse = SPARSE if kind.endswith('sparse') else DENSE
        return models.TerraformerLM(32_000, 1024, 4096, 24, 16, 1024, activation='relu', **sparse)
    return models.ReformerLM(
        VOCAB,
        D_MODEL,
        D_FF,
        LAYERS,
        HEADS,
        MAX_LEN,
        n_hashes=HASHES,
        chunk_len=CHUNK,
        axial_depths=(256, 512),
    )


def ours(kind, bits, context, n_tokens, n_turns):
    """A turn of ours, and what it reads a token."""
    import jax
    import numpy as np

    import layercomb as lc
    from layercomb import transforms, trees
    from layercomb.supervised import decoding

    kind, _, part = kind.partition('-') if kind.endswith('prompt') else (kind, '', '')
    net = our_model(kind)
    weights, _ = jax.jit(net.init)((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))
    net, weights = lc.unstack(net, weights)
    if bits != 32:
        net, weights = transforms.quantize(net, weights, lambda path: bits)
    size = 0
    for path, weight in trees.flatten(weights).items():
        unit = 'sparse_ff/in' in path or 'sparse_ff/out/kernel' in path
        size += 0 if path.startswith('embedding') else weight.nbytes // (64 if unit else 1)
    model = lc.Model(net, weights, {})
    prompt = np.random.default_rng(0).integers(0, our_vocabulary(kind), (1, context))
    room = n_tokens * (n_turns + 2)

    def start():
        return decoding.stream(model, prompt, room, temperature=0)

    if part:
        return (lambda: int(next(start())[0])), size
    tokens = start()
    next(tokens), next(tokens)
    return (lambda: [int(next(tokens)[0]) for _ in range(n_tokens)][-1]), size


def our_vocabulary(kind):
    return 32_000 if kind.startswith('800m') else VOCAB


def peer(kind, bits, context, n_tokens, n_turns):
    """A turn of Hugging Face's, and what it reads a token."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == 'gpt2':
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=1024)
        model, past_is = transformers.GPT2LMHeadModel(config), 'past_key_values'
        unread = model.transformer.wpe.weight.numel()  # the tied table is read, as the head
    else:
        n_buckets = max(4, 2 ** ((2 * context // CHUNK).bit_length() - 1))
        config = transformers.ReformerConfig(
            attn_layers=['lsh'] * LAYERS,
            hidden_size=D_MODEL,
            num_attention_heads=HEADS,
            attention_head_size=D_MODEL // HEADS,
            feed_forward_size=D_FF,
            vocab_size=VOCAB,
            is_decoder=True,
            num_hashes=HASHES,
            lsh_attn_chunk_length=CHUNK,
            max_position_embeddings=8192,
            axial_pos_shape=(64, 128),
            axial_pos_embds_dim=(256, 512),
            num_buckets=n_buckets,
            tie_word_embeddings=False,
        )
        model, past_is = transformers.ReformerModelWithLMHead(config), 'past_buckets_states'
        unread = sum(p.numel() for name, p in model.named_parameters() if 'embeddings' in name)
    model = (model.bfloat16() if bits == 16 else model).eval()
    size = (sum(p.numel() for p in model.parameters()) - unread) * bits // 8
    prompt, past = torch.randint(0, VOCAB, (1, context)), None

    def run(tokens):
        nonlocal past
        with torch.no_grad():
            out = model(tokens, use_cache=True, **({} if past is None else {past_is: past}))
        past = out[past_is]
        return out.logits[:, -1:].argmax(-1)

    def ingest():
        nonlocal past
        past = None
        return int(run(prompt))

    if kind.endswith('prompt'):
        return ingest, size
    token = run(prompt)

    def step():
        nonlocal token
        for _ in range(n_tokens):
            token = run(token)
        return int(token)

    return step, size


def bandwidth():
    """A turn that reads a matrix of 1 GiB."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((16384, 16384)), jnp.ones((1, 16384))
    multiply = jax.jit(jnp.dot)
    return (lambda: float(multiply(vector, matrix)[0, 0])), matrix.nbytes


def make_step(contestant, n_tokens, n_turns):
    who, kind, bits, context = contestant.split()
    if who == 'bandwidth':
        return bandwidth()
    make = ours if who == 'ours' else peer
    return make(kind, int(bits), int(context), n_tokens, n_turns)


def compare(title, contestants, per_turn, options, baselines):
    """Runs a table and prints it.

    Args:
      title: of the table.
      contestants: label → (contestant, environment).
      per_turn: tokens in a turn.
      options: of the command line.
      baselines: of each label, the one that it is measured against.
    """
    workers = take_turns(
        {**contestants, **BANDWIDTH}, options.repeats, options.tokens, options.repeats
    )
    rate = workers.pop('bandwidth')
    rate = rate.temporaries / rate.best('wall')
    print(f'\n## {title}\n\nmemory gives {rate / 1e9:.1f} GB/s\n')
    print(
        '| | read | wall ms | tokens/s | CPU ms | of the ceiling | beside | wall | CPU | peak MB |'
    )
    print('|---|---:|---:|---:|---:|---:|---|---:|---:|---:|')
    for label, worker in workers.items():
        wall, cpu = (worker.best(what) / per_turn for what in ('wall', 'cpu'))
        share = '' if per_turn == 1 else f'{worker.temporaries / rate / wall:.0%}'
        other = baselines.get(label)
        beside = ' | | '
        if other:
            ratios = (workers[other].best(what) / worker.best(what) for what in ('wall', 'cpu'))
            beside = ' | '.join([other, *(f'{ratio:.2f}×' for ratio in ratios)])
        print(
            f'| {label} | {worker.temporaries / 1e6:.0f} MB | {wall * 1e3:.1f} | {1 / wall:.1f} '
            f'| {cpu * 1e3:.1f} | {share} | {beside} '
            f'| {max(step["peak"] for step in worker.steps) / 1e6:.0f} |',
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tables', nargs='*', default=['gpt2', 'reformer', 'prompt', '800m'])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--tokens', type=int, default=16, help='a turn')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        contestant, *numbers = options.worker
        serve(make_step, contestant, *map(int, numbers))
        return
    print(describe('jaxlib', 'torch', 'transformers'))
    n, theirs = options.tokens, 'Hugging Face'
    tables = {
        'gpt2': (
            'GPT-2, 124M (asked: 1.5× Hugging Face, 70 % of the ceiling; int8 2.5× our float32)',
            GPT2,
            n,
            {'ours': theirs, **{f'ours, {k}': 'ours' for k in ('bfloat16', 'int8', 'int4')}},
        ),
        'reformer': (
            'Reformer, 194M (asked: 6× at 64, 9× at 4,096; 32,768 within 1.2× of 1,024)',
            REFORMER,
            n,
            {
                'ours, 64': f'{theirs}, 64',
                'ours, 4,096': f'{theirs}, 4,096',
                'ours, 32,768': 'ours, 1,024',
                'ours, 4,096, int8': 'ours, 4,096',
            },
        ),
        'prompt': ('A prompt of 4,096 tokens (asked: 3×)', PROMPT, 1, {'ours': theirs}),
        '800m': (
            'Terraformer, 800M',
            LARGE,
            n,
            {label: 'dense' for label in ('dense, int8', 'dense, int4', 'sparse', 'sparse, int8')},
        ),
    }
    for name in options.tables:
        start = time.perf_counter()
        title, contestants, per_turn, baselines = tables[name]
        compare(title, contestants, per_turn, options, baselines)
        print(f'\n({time.perf_counter() - start:.0f} s)')


if __name__ == '__main__':
    main()
