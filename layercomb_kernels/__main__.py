"""``python -m layercomb_kernels``: compiles the kernels ahead and reports whether they work."""

from __future__ import annotations

import sys

import layercomb_kernels
from layercomb_kernels import library


def main() -> int:
    """Prints where the kernels are, or why there are none; returns 0 if they work, else 1."""
    reason = layercomb_kernels.why_not()
    if reason is not None:
        print(f"no kernels, products are XLA's: {reason}")
        return 1
    found = library.load()
    print(f'kernels ready: {found.path}, {found.origin}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
