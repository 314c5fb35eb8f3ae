"""Sources of text and examples, and the pipelines that make batches of them.

A source is a sequence: documents (str or bytes), or examples (inputs, targets, loss_weights). A
pipeline turns a source into a `grain.IterDataset` of batches of numpy arrays, whose iterator can be
stopped and resumed exactly.
"""

from layercomb.data.ngrams import witten_bell_bits_on_batches, witten_bell_bits_per_byte
from layercomb.data.pipelines import batches, bucketed, packed
from layercomb.data.sources import python_stdlib, text_files, tfds
from layercomb.data.tasks import copy, duplication
from layercomb.data.tokenizers import ByteTokenizer

__all__ = [
    'ByteTokenizer',
    'batches',
    'bucketed',
    'copy',
    'duplication',
    'packed',
    'python_stdlib',
    'text_files',
    'tfds',
    'witten_bell_bits_on_batches',
    'witten_bell_bits_per_byte',
]
