"""Sources of text and examples, and the pipelines that make batches of them.

A source is a sequence: documents (str or bytes), or examples (inputs, targets, loss_weights). A
pipeline turns a source into a `grain.IterDataset` of batches of numpy arrays, whose iterator can be
stopped and resumed exactly.
"""

from layercomb.data.corpora.docstrings import python_docstrings
from layercomb.data.corpora.drawn import shapes
from layercomb.data.corpora.images import cifar10, imagenet64, png_images, subpixels
from layercomb.data.corpora.published import c4, scientific_papers
from layercomb.data.corpora.wikipedia import enwik8
from layercomb.data.held_out import held_out
from layercomb.data.ngrams import witten_bell_bits_on_batches, witten_bell_bits_per_byte
from layercomb.data.pairs import continuations, pairs
from layercomb.data.pipelines import batches, bucketed, packed
from layercomb.data.sources import python_stdlib, text_files, tfds
from layercomb.data.tasks import copy, copy_pairs, duplication
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    'ByteTokenizer',
    'Tokenizer',
    'batches',
    'bucketed',
    'c4',
    'cifar10',
    'continuations',
    'copy',
    'copy_pairs',
    'duplication',
    'enwik8',
    'held_out',
    'imagenet64',
    'packed',
    'pairs',
    'png_images',
    'python_docstrings',
    'python_stdlib',
    'scientific_papers',
    'shapes',
    'subpixels',
    'text_files',
    'tfds',
    'witten_bell_bits_on_batches',
    'witten_bell_bits_per_byte',
]
