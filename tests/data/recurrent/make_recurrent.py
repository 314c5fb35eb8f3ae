"""Makes torch.npz: what PyTorch's LSTM and GRU answer, one way and both, and their gradients.

    PYTHON_WITH_TORCH tests/data/recurrent/make_recurrent.py

Rows have 6 and 4 real positions; both ways they are packed, so that padding is not read.
"""

import pathlib

import numpy as np
import torch
from torch.nn.utils import rnn

B, L, D, N = 2, 6, 3, 4
LENGTHS = [6, 4]


def answers(kind, both):
    """Weights, outputs, and gradients of Σ y·dy, by name."""
    torch.manual_seed(0)
    layer = kind(D, N, batch_first=True, bidirectional=both)
    x = torch.randn(B, L, D, requires_grad=True)
    if both:
        given = rnn.pack_padded_sequence(x, LENGTHS, batch_first=True)
        y, _ = rnn.pad_packed_sequence(layer(given)[0], batch_first=True)
    else:
        y, _ = layer(x)
    dy = torch.randn(y.shape)
    (y * dy).sum().backward()
    named = dict(layer.named_parameters())
    return {
        **named,
        **{f'd_{name}': weight.grad for name, weight in named.items()},
        'x': x,
        'y': y,
        'dy': dy,
        'd_x': x.grad,
    }


made = {}
for kind in (torch.nn.LSTM, torch.nn.GRU):
    for both in (False, True):
        place = f'{kind.__name__}{" both" if both else ""}'
        found = answers(kind, both)
        made |= {f'{place}/{name}': v.detach().numpy() for name, v in found.items()}
np.savez_compressed(pathlib.Path(__file__).parent / 'torch.npz', **made)
