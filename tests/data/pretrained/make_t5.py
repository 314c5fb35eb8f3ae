"""Writes the tiny T5 models of this folder: random weights and outputs by transformers.

pip install torch transformers; python make_t5.py
"""

import pathlib

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent
SIZES = {
    'vocab_size': 40, 'd_model': 16, 'd_kv': 6, 'd_ff': 24, 'num_layers': 2,
    'num_heads': 2, 'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 10, 'pad_token_id': 0, 'eos_token_id': 1,
    'decoder_start_token_id': 0,
}  # fmt: skip
MADE = {
    't5': {},
    't5_gated': {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
}

for name, more in MADE.items():
    torch.manual_seed(0)
    net = t.T5ForConditionalGeneration(t.T5Config(**SIZES, **more)).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn_like(weight)
    net.save_pretrained(HERE / name)
    rng = np.random.default_rng(0)
    source, inputs = rng.integers(2, 40, (2, 14)), rng.integers(2, 40, (2, 6))
    mask = np.ones((2, 14), int)
    mask[1, 9:], source[1, 9:] = 0, 0
    given = {'input_ids': source, 'attention_mask': mask, 'decoder_input_ids': inputs}
    tensors = {key: torch.tensor(x) for key, x in given.items()}
    with torch.no_grad():
        logits = net(**tensors).logits.numpy()
        made = net.generate(
            tensors['input_ids'], attention_mask=tensors['attention_mask'], max_new_tokens=16,
            num_beams=1, do_sample=False, eos_token_id=999,
        ).numpy()  # fmt: skip
    np.savez_compressed(HERE / name / 'expected.npz', logits=logits, made=made, **given)
