"""Sources of text and examples, and the pipelines that make batches of them.

A source is a sequence: documents (str or bytes), or examples (inputs, targets, loss_weights). A
pipeline turns a source into a `grain.IterDataset` of batches of numpy arrays, whose iterator can be
stopped and resumed exactly.
"""

from layercomb.data.drawn import shapes
from layercomb.data.images import cifar10, imagenet64, png_images, subpixels
from layercomb.data.ngrams import witten_bell_bits_on_batches, witten_bell_bits_per_byte
from layercomb.data.pipelines import batches, bucketed, packed
from layercomb.data.sources import python_stdlib, text_files, tfds
from layercomb.data.tasks import copy, duplication
from layercomb.data.tokenizers import ByteTokenizer
from layercomb.data.wikipedia import enwik8

__all__ = [
    'ByteTokenizer',
    'batches',
    'bucketed',
    'cifar10',
    'copy',
    'duplication',
    'enwik8',
    'imagenet64',
    'packed',
    'png_images',
    'python_stdlib',
    'shapes',
    'subpixels',
    'text_files',
    'tfds',
    'witten_bell_bits_on_batches',
    'witten_bell_bits_per_byte',
]
