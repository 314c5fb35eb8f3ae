"""Decoding: `generate`, `stream`, `beam_search`, `score`, `likelihood` and `embed`."""

from layercomb.supervised.decoding.beams import Beams, beam_search
from layercomb.supervised.decoding.embedding import embed
from layercomb.supervised.decoding.generate import generate, stream
from layercomb.supervised.decoding.likelihood import likelihood
from layercomb.supervised.decoding.prompts import max_len
from layercomb.supervised.decoding.sampling import Sampler
from layercomb.supervised.decoding.scoring import Scores, score

__all__ = [
    'Beams',
    'Sampler',
    'Scores',
    'beam_search',
    'embed',
    'generate',
    'likelihood',
    'max_len',
    'score',
    'stream',
]
