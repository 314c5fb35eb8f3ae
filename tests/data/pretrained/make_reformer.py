"""Writes the tiny Reformer of this folder: random weights and outputs by transformers.

pip install torch transformers; python make_reformer.py
"""

import pathlib

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent / 'reformer'
# Up to a chunk, in two, whole chunks, and with padding.
LENGTHS = (3, 8, 9, 16, 21, 29, 32)

torch.manual_seed(0)
config = t.ReformerConfig(
    vocab_size=40, hidden_size=16, attn_layers=['local', 'lsh', 'local', 'lsh'],
    num_attention_heads=2, attention_head_size=6, feed_forward_size=24, hidden_act='relu',
    axial_pos_embds=True, axial_pos_shape=[4, 8], axial_pos_embds_dim=[6, 10],
    max_position_embeddings=32, local_attn_chunk_length=4, lsh_attn_chunk_length=8,
    num_hashes=2, num_buckets=[2, 4], hash_seed=7, is_decoder=True, pad_token_id=0,
    eos_token_id=2, initializer_range=0.3,
)  # fmt: skip
net = t.ReformerModelWithLMHead(config).eval()
with torch.no_grad():
    for weight in net.parameters():
        weight += 0.2 * torch.randn_like(weight)
net.save_pretrained(HERE)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 40, (2, 32))
found = {}
with torch.no_grad():
    for n in LENGTHS:
        out = net(torch.tensor(tokens[:, :n]), use_cache=False)
        found[f'logits_{n}'] = out.logits.numpy()
    made = tokens[:, :6]
    while made.shape[1] < 32:  # greedily, without the cache, which computes something else
        logits = net(torch.tensor(made), use_cache=False).logits[:, -1].numpy()
        made = np.concatenate([made, logits.argmax(-1)[:, None]], 1)
draws = {}
for seed, n in ((0, 1), (1, 15), (0, 16), (3, 20), (2**33 + 5, 40), (-1, 17)):
    torch.manual_seed(seed)
    draws[f'normal {seed} {n}'] = torch.randn(n).numpy()
np.savez_compressed(HERE / 'expected.npz', tokens=tokens, made=made, **found, **draws)
