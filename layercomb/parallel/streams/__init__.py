"""Training whose residual streams live in host memory."""

from layercomb.parallel.streams.model import Streamed, streamed, unwrapped_ties

__all__ = ['Streamed', 'streamed', 'unwrapped_ties']
