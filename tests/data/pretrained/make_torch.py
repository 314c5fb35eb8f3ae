"""Makes torch/*.bin: what torch.save writes, beside the same numbers as NumPy's (needs torch).

Run as `python tests/data/pretrained/make_torch.py`.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / 'torch'


def main():
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    base = torch.randn(3, 4)
    tensors = OrderedDict(
        base=base,
        turned=base.T,
        part=base[1:, ::2],
        shared=base,
        one=torch.tensor(2.5),
        none=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2)),
        double=torch.randn(2, dtype=torch.float64),
        half=torch.randn(2).half(),
        bfloat16=torch.randn(2).bfloat16(),
        long=torch.arange(3),
    )
    torch.save(tensors, FOLDER / 'tensors.bin')
    torch.save(tensors, FOLDER / 'legacy.bin', _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 3).state_dict(), FOLDER / 'module.bin')
    known = {name: x.detach().double().numpy() for name, x in tensors.items()}
    np.savez_compressed(FOLDER / 'tensors.npz', **known)


if __name__ == '__main__':
    main()
