"""A training step of the Reformer, beside Hugging Face's, reformer-pytorch and torch's SDPA.

    pip install -e '.[bench]'
    python benchmarks/reformer_step.py --lengths 1024 2048 3072 4096 8192 16384 32768 --repeats 2

Six layers, d_model 256, 4 heads, d_ff 1024 with ReLU, 256 tokens, batch 1, float32, no dropout; a
step is the loss, its gradients, and for ours a plain SGD update as well. Hashing of the others has
chunks of 64 and 4 hashes. Ours has `HashedSelfAttention` as it comes, with keys of their own, 8
rounds of 8 keys and 32 near ones; the same with 4 rounds of 64 and 64 near ones; and
`LSHSelfAttention`, whose queries are its keys. The standard Transformer has full attention.

The peers need not be where layercomb is: `--peer` names a Python that has torch and transformers.

Contestants take turns. Each runs as it comes (``default malloc``), and with the allocator that
suits it best: torch's with one that keeps its pages, ours with huge pages, which ``layercomb
train`` asks for by itself. Of the repeats the best counts.

The floor is the time of the matrix products of shared keys alone, at the rate that one product of
this machine reached in this run: per token and layer, projections and feed-forward forward, again,
and two gradients; attention's two products forward, two again and five backward for every hash.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

from machine import describe
from torch_steps import next_token_loss, torch_step, transformer_step
from turns import HUGE_PAGES, KEEP_PAGES, TORCH, serve, take_turns

LAYERS, D_MODEL, HEADS, D_FF, VOCAB, CHUNK, HASHES = 6, 256, 4, 1024, 256, 64, 4
CONTESTANTS = {
    'ours': ('layercomb', {}),
    'ours, huge pages': ('layercomb', HUGE_PAGES),
    'ours, 4 x 64 + local 64': ('layercomb/wide', HUGE_PAGES),
    'ours, shared keys': ('layercomb/shared', HUGE_PAGES),
    'Hugging Face': ('transformers', TORCH),
    'Hugging Face, pages kept': ('transformers', {**TORCH, **KEEP_PAGES}),
    'reformer-pytorch': ('reformer_pytorch', TORCH),
    'reformer-pytorch, pages kept': ('reformer_pytorch', {**TORCH, **KEEP_PAGES}),
    'SDPA': ('sdpa', TORCH),
    'SDPA, pages kept': ('sdpa', {**TORCH, **KEEP_PAGES}),
}
DEFAULT = ('ours', 'ours, huge pages')


def layercomb_step(length, kind='hashed'):
    """A function that runs one step of ours, and the bytes of its temporaries."""
    import jax

    from layercomb import losses, models, tl

    attention = {
        'hashed': tl.HashedSelfAttention(HEADS),
        'wide': tl.HashedSelfAttention(HEADS, n_hashes=HASHES, chunk_len=CHUNK, local_len=CHUNK),
        'shared': tl.LSHSelfAttention(HEADS, n_hashes=HASHES, chunk_len=CHUNK),
    }[kind]
    net = models.ReformerLM(
        VOCAB,
        D_MODEL,
        D_FF,
        LAYERS,
        HEADS,
        max_len=length,
        attention=attention,
        activation='relu',
    )
    net = losses.attach(net, tl.CrossEntropyLoss(), chunk_len=1024)
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, VOCAB)
    batch = (tokens, jax.numpy.roll(tokens, -1, 1), jax.numpy.ones((1, length)))
    signature = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    weights, state = jax.jit(lambda key: net.init(signature, key))(jax.random.key(0))

    def loss(weights, key):
        (values, _), _ = net.apply(weights, state, batch, rng=key, mode=tl.Mode.TRAIN)
        return values.mean()

    def update(weights, key):
        value, grads = jax.value_and_grad(loss)(weights, key)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, grads), value

    update = jax.jit(update, donate_argnums=0).lower(weights, jax.random.key(0)).compile()
    held = {'weights': weights, 'number': 0}

    def step():
        held['number'] += 1
        held['weights'], value = update(held['weights'], jax.random.key(held['number']))
        return float(jax.block_until_ready(value))

    return step, update.memory_analysis().temp_size_in_bytes


def transformers_step(length):
    """Hugging Face's Reformer, all of its layers LSH, reversible as it ships."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        attn_layers=['lsh'] * LAYERS,
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        attention_head_size=D_MODEL // HEADS,
        feed_forward_size=D_FF,
        hidden_act='relu',
        vocab_size=VOCAB,
        is_decoder=True,
        num_hashes=HASHES,
        lsh_attn_chunk_length=CHUNK,
        num_buckets=None,
        max_position_embeddings=length,
        axial_pos_shape=(64, length // 64),
        axial_pos_embds_dim=(D_MODEL // 4, D_MODEL - D_MODEL // 4),
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=None,
        tie_word_embeddings=False,
    )
    model = transformers.ReformerModelWithLMHead(config).train()
    return torch_step(model, length, VOCAB, lambda net, x: net(input_ids=x, labels=x).loss)


def reformer_pytorch_step(length):
    """reformer-pytorch's model, reversible as it ships."""
    import torch
    from reformer_pytorch import ReformerLM

    torch.manual_seed(0)
    model = ReformerLM(
        num_tokens=VOCAB,
        dim=D_MODEL,
        depth=LAYERS,
        max_seq_len=length,
        heads=HEADS,
        dim_head=D_MODEL // HEADS,
        bucket_size=CHUNK,
        n_hashes=HASHES,
        causal=True,
        ff_chunks=1,
        ff_mult=D_FF // D_MODEL,
        ff_activation=torch.nn.ReLU,
    ).train()
    return torch_step(model, length, VOCAB, next_token_loss)


def sdpa_step(length):
    """A standard pre-norm Transformer on torch's scaled_dot_product_attention."""
    return transformer_step(length, LAYERS, D_MODEL, HEADS, D_FF, VOCAB, 'relu')


STEPS = {
    'layercomb': layercomb_step,
    'layercomb/wide': functools.partial(layercomb_step, kind='wide'),
    'layercomb/shared': functools.partial(layercomb_step, kind='shared'),
    'transformers': transformers_step,
    'reformer_pytorch': reformer_pytorch_step,
    'sdpa': sdpa_step,
}


def products(length):
    """FLOPs of the matrix products of one of our steps, see the top."""
    dense = 2 * 4 * (3 * D_MODEL**2 + 2 * D_MODEL * D_FF)
    attention = 2 * (2 + 2 + 5) * HASHES * 2 * CHUNK * D_MODEL
    head = 2 * 4 * 2 * D_MODEL * VOCAB
    return length * (LAYERS * (dense + attention) + head)


def flops_per_cpu_second():
    """What a product of 2,048 square matrices reaches: the best of six."""
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    multiply = jax.jit(lambda x: x @ x)
    best = float('inf')
    for _ in range(6):
        start = time.process_time()
        jax.block_until_ready(multiply(x))
        best = min(best, time.process_time() - start)
    return 2 * 2048**3 / best


def compare(length, repeats, labels, rate, peer):
    """One length: the contestants in turns, and a table of them. Returns our workers' figures."""
    chosen = {
        label: (*CONTESTANTS[label], sys.executable if label.startswith('ours') else peer)
        for label in labels
    }
    workers = take_turns(chosen, repeats, '--lengths', length)
    ours = min(w.best('cpu') for label, w in workers.items() if label in DEFAULT)
    floor = products(length) / rate
    print(f'\n### {length} tokens: floor {floor:.2f} CPU s, {floor / ours:.0%} of it reached\n')
    print('| | CPU s | ours is | wall s | peak above base, GiB | temporaries, GiB |')
    print('|---|---:|---:|---:|---:|---:|')
    for label, worker in workers.items():
        cpu, peak = worker.best('cpu'), worker.best('peak') / 2**30
        made = '' if worker.temporaries is None else f'{worker.temporaries / 2**30:.3f}'
        row = f'{cpu:.2f} | {ours / cpu:.2f} × | {worker.best("wall"):.2f} | {peak:.2f} | {made}'
        print(f'| {label} | {row} |', flush=True)
    return ours


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [1024, 2048, 3072, 4096, 8192, 16384, 32768]
    parser.add_argument('--lengths', type=int, nargs='+', default=lengths)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--only', nargs='+', choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument('--peer', default=sys.executable)
    parser.add_argument('--worker', choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(STEPS[args.worker], args.lengths[0])
        return
    if not any(label in DEFAULT for label in args.only):
        parser.error("--only must name 'ours' or 'ours, huge pages', to which others are compared")
    print(describe('jaxlib', 'torch', 'transformers', 'reformer-pytorch'))
    rate = flops_per_cpu_second()
    print(f'a product of 2,048 square matrices: {rate / 1e9:.0f} GFLOP per CPU second')
    print('asked at 16,384: 0.36 × Hugging Face as it comes, 0.6 × with pages kept; 0.3 GB of')
    print('temporaries; below SDPA from 3,072 on; a token at 32,768 at most 1.2 × one at 2,048')
    per_token = {}
    for length in sorted(args.lengths):
        per_token[length] = compare(length, args.repeats, args.only, rate, args.peer) / length
    first = min(per_token)
    print('\nCPU µs a token: ', end='')
    print(', '.join(f'{x * 1e6:.0f} at {length}' for length, x in per_token.items()), end='; ')
    print(f'the last is {per_token[max(per_token)] / per_token[first]:.2f} × the first')


if __name__ == '__main__':
    main()
