"""Sources of text and examples, and the pipelines that make batches of them.

A source is a sequence: documents (str or bytes), or examples (inputs, targets, loss_weights). For
fine-tuning, `chat`, `instructions` and `text_folder` make documents of tokens, (ids, weights), of
people's own text; `length_report` measures them, and `packed_documents` makes batches. A pipeline
turns a source into a `grain.IterDataset` of batches of numpy arrays, whose iterator can be
stopped and resumed exactly.
"""

from layercomb.data.corpora.about import about_layercomb
from layercomb.data.corpora.docstrings import python_docstrings
from layercomb.data.corpora.drawn import shapes
from layercomb.data.corpora.images import cifar10, imagenet64, png_images, subpixels
from layercomb.data.corpora.manual import python_manual
from layercomb.data.corpora.published import c4, scientific_papers
from layercomb.data.corpora.topics import python_topics
from layercomb.data.corpora.wikipedia import enwik8
from layercomb.data.finetuning.batches import packed_documents
from layercomb.data.finetuning.documents import Document, chat, instructions
from layercomb.data.finetuning.report import LengthReport, length_report
from layercomb.data.finetuning.text import text_folder
from layercomb.data.held_out import held_out
from layercomb.data.judged.batches import preference_batches
from layercomb.data.judged.labels import labelled, labels
from layercomb.data.judged.preferences import preferences
from layercomb.data.ngrams import witten_bell_bits_on_batches, witten_bell_bits_per_byte
from layercomb.data.pairs import continuations, pairs
from layercomb.data.pipelines import batches, bucketed, packed
from layercomb.data.recalling import needles, recall
from layercomb.data.sources import python_stdlib, text_files, tfds
from layercomb.data.tasks import copy, copy_pairs, duplication
from layercomb.data.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    'ByteTokenizer',
    'Document',
    'LengthReport',
    'Tokenizer',
    'about_layercomb',
    'batches',
    'bucketed',
    'c4',
    'chat',
    'cifar10',
    'continuations',
    'copy',
    'copy_pairs',
    'duplication',
    'enwik8',
    'held_out',
    'imagenet64',
    'instructions',
    'labelled',
    'labels',
    'length_report',
    'needles',
    'packed',
    'packed_documents',
    'pairs',
    'png_images',
    'preference_batches',
    'preferences',
    'python_docstrings',
    'python_manual',
    'python_stdlib',
    'python_topics',
    'recall',
    'scientific_papers',
    'shapes',
    'subpixels',
    'text_files',
    'text_folder',
    'tfds',
    'witten_bell_bits_on_batches',
    'witten_bell_bits_per_byte',
]
