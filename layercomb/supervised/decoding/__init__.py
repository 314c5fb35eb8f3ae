"""Decoding: `generate`, `stream`, `beam_search`, `score`, `likelihood`, `embed` and `classify`."""

from layercomb.supervised.decoding.beams import Beams, beam_search
from layercomb.supervised.decoding.classifying import Classified, classify
from layercomb.supervised.decoding.drafts import Draft, Lookup
from layercomb.supervised.decoding.embedding import embed
from layercomb.supervised.decoding.generate import generate, stream
from layercomb.supervised.decoding.likelihood import likelihood
from layercomb.supervised.decoding.memory import decoding_bytes
from layercomb.supervised.decoding.prompts import max_len
from layercomb.supervised.decoding.sampling import Sampler
from layercomb.supervised.decoding.scoring import Scores, score

__all__ = [
    'Beams',
    'Classified',
    'Draft',
    'Lookup',
    'Sampler',
    'Scores',
    'beam_search',
    'classify',
    'decoding_bytes',
    'embed',
    'generate',
    'likelihood',
    'max_len',
    'score',
    'stream',
]
