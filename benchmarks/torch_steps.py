"""Training steps of torch's models, and the standard Transformer that ours are compared with."""

from __future__ import annotations

import functools


def torch_step(model, length, vocab_size, loss_of):
    """A function that runs one step of a model on random tokens, and None for its temporaries."""
    import torch

    tokens = torch.randint(0, vocab_size, (1, length))

    def step():
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, tokens)
        loss.backward()
        return loss.item()

    return step, None


def next_token_loss(model, tokens):
    """The cross-entropy of the next token from a model's logits."""
    import torch

    logits = model(tokens)
    targets = torch.roll(tokens, -1, 1).view(-1)
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets)


def transformer_step(length, n_layers, d_model, n_heads, d_ff, vocab_size, activation):
    """`torch_step` of a pre-norm causal Transformer on torch's scaled_dot_product_attention.

    Args:
      length, n_layers, d_model, n_heads, d_ff, vocab_size: sizes.
      activation: 'relu', or 'gelu' for the one by tanh.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    act = F.relu if activation == 'relu' else functools.partial(F.gelu, approximate='tanh')

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
            self.qkv, self.merge = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
            self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

        def forward(self, x):
            qkv = self.qkv(self.norm_1(x)).view(1, length, 3, n_heads, d_model // n_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, K) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.merge(y.transpose(1, 2).reshape(1, length, d_model))
            return x + self.down(act(self.up(self.norm_2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocab_size, d_model)
            self.place = nn.Embedding(length, d_model)
            self.blocks = nn.Sequential(*(Block() for _ in range(n_layers)))
            self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab_size)

        def forward(self, tokens):
            return self.head(self.norm(self.blocks(self.embed(tokens) + self.place.weight)))

    torch.manual_seed(0)
    return torch_step(Model(), length, vocab_size, next_token_loss)
