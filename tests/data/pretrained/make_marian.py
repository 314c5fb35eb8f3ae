"""Writes the tiny translator of this folder: random weights and outputs by transformers.

pip install torch transformers; python make_marian.py
"""

import pathlib

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent / 'marian'

torch.manual_seed(0)
config = t.MarianConfig(
    vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=24,
    activation_function='swish', scale_embedding=True, pad_token_id=39, eos_token_id=0,
    decoder_start_token_id=39, forced_eos_token_id=0, init_std=0.3,
)  # fmt: skip
net = t.MarianMTModel(config).eval()
with torch.no_grad():
    for name, weight in net.named_parameters():
        if 'embed_positions' not in name:
            weight += 0.1 * torch.randn_like(weight)
    net.final_logits_bias += torch.randn_like(net.final_logits_bias)
net.save_pretrained(HERE)
rng = np.random.default_rng(0)
source, inputs = rng.integers(1, 39, (2, 8)), rng.integers(1, 39, (2, 6))
mask = np.ones((2, 8), int)
mask[1, 5:], source[1, 5:] = 0, 39
given = {'input_ids': source, 'attention_mask': mask, 'decoder_input_ids': inputs}
with torch.no_grad():
    tensors = {key: torch.tensor(x) for key, x in given.items()}
    logits = net(**tensors).logits.numpy()
    made = net.generate(
        tensors['input_ids'], attention_mask=tensors['attention_mask'], max_new_tokens=16,
        num_beams=1, do_sample=False, forced_eos_token_id=None, eos_token_id=999,
    ).numpy()  # fmt: skip
np.savez_compressed(HERE / 'expected.npz', logits=logits, made=made, **given)
