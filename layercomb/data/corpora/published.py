"""Published corpora: C4, and scientific papers with their abstracts."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from layercomb.data import files
from layercomb.data.corpora.choice import StandIn, choose
from layercomb.data.corpora.jsonlines import ALL, JsonLines, share_of
from layercomb.data.sources import Mapped, tfds, tfds_records

Pair = tuple[bytes, bytes]

_TFDS_SPLITS = {'train': 'train', 'valid': 'validation', 'test': 'test'}
_C4 = {'train': 'c4-train.*.json*', 'valid': 'c4-validation.*.json*'}
_C4_CURE = "JSON lines with a field 'text', such as c4-train.00000-of-01024.json.gz"
_PAPERS = {'train': 'train.*', 'valid': 'val*.*', 'test': 'test.*'}
_PAPERS_CURE = (
    "JSON lines with 'article_text' and 'abstract_text', such as arxiv-dataset/train.txt "
    '(github.com/armancohan/long-summarization)'
)


def c4(
    path: str | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    stand_in: StandIn = None,
    *,
    name: str = 'c4/en',
) -> Sequence[bytes]:
    """Returns documents of C4, the colossal cleaned crawl: text of web pages.

    Without a path, TFDS is asked, then `stand_in` is returned, and a line on stderr says so.

    Args:
      path: the folder as published, where 'train' is ``c4-train.*.json*`` and 'valid' is
        ``c4-validation.*.json*``; or a file or glob pattern of JSON lines, where every 20th line is
        for 'valid' and the others are for 'train'. A line of a plain file is read when it is asked
        for. Files that end in .gz have no random access: they are read into memory when the first
        document is asked for, so give only some of them, and use TFDS for all of C4.
      split: 'train' or 'valid'.
      data_dir: where TFDS has prepared it.
      stand_in: other documents, for machines that have no C4, or a function that returns them.
      name: of the data set in TFDS, which has a feature 'text'.

    Raises:
      TypeError: if `path` is no path.
      ValueError: if there is no such split.
      UsageError: if no file matches, or there is neither data nor stand-in; later, when documents
        are asked for, if a file cannot be read or a line has no text.

    References:
      Raffel et al. 2020, T5, https://arxiv.org/abs/1910.10683
    """
    if split not in _C4:
        raise ValueError(f"split={split!r}: choose 'train' or 'valid'")
    return choose(
        'c4',
        path,
        lambda path: Mapped(_local(path, split, _C4, (('text',),), _C4_CURE), itemgetter(0)),
        lambda: tfds(name, _TFDS_SPLITS[split], data_dir),
        stand_in,
        _C4_CURE,
        asked=data_dir is not None or name != 'c4/en',
    )


def scientific_papers(
    path: str | None = None,
    split: str = 'train',
    data_dir: str | None = None,
    stand_in: StandIn = None,
    *,
    name: str = 'scientific_papers/arxiv',
) -> Sequence[Pair]:
    """Returns papers from arXiv or PubMed with their abstracts, for `pairs`.

    Without a path, TFDS is asked, then `stand_in` is returned, and a line on stderr says so.

    Args:
      path: the folder as published, which holds train.txt, val.txt and test.txt; or a file or glob
        pattern of JSON lines, where of each twenty lines one is for 'valid' and one for 'test'. For
        files that end in .gz, see `c4`. A line has 'article_text' and 'abstract_text', lists of
        sentences, or 'article' and 'abstract', strings.
      split: 'train', 'valid' or 'test'.
      data_dir: where TFDS has prepared it.
      stand_in: other pairs, such as `python_docstrings`, or a function that returns them.
      name: of the data set in TFDS, which has features 'article' and 'abstract'.

    Returns:
      A sequence of (article, abstract), bytes. Sentences are joined by newlines, and the marks <S>
      and </S> around them are removed from the abstract, as in TFDS.

    Raises:
      TypeError: if `path` is no path.
      ValueError: if there is no such split.
      UsageError: as `c4`.

    References:
      Cohan et al. 2018, A discourse-aware attention model for abstractive summarization of long
      documents, https://arxiv.org/abs/1804.05685
    """
    files.check_split(split)
    in_tfds = ('article', 'abstract')
    fields = (('article_text', 'abstract_text'), in_tfds)

    def prepared() -> Sequence[Pair]:
        records = tfds_records(name, _TFDS_SPLITS[split], data_dir, in_tfds)
        return Mapped(records, partial(_pair, names=in_tfds))

    return choose(
        'scientific_papers',
        path,
        lambda path: Mapped(_local(path, split, _PAPERS, fields, _PAPERS_CURE), _without_marks),
        prepared,
        stand_in,
        _PAPERS_CURE,
        asked=data_dir is not None or name != 'scientific_papers/arxiv',
    )


def _local(
    path: str,
    split: str,
    published: dict[str, str],
    fields: tuple[tuple[str, ...], ...],
    cure: str,
) -> JsonLines:
    """The lines of a split: its files in a published folder, or its share of other files."""
    if os.path.isdir(path):
        pattern, share = os.path.join(glob.escape(path), published[split]), ALL
    else:
        pattern, share = path, share_of(split, tuple(published))
    return JsonLines(files.matching(pattern, None, files.TEXT), fields, share, cure)


def _pair(record: Any, names: tuple[str, str]) -> Pair:
    first, second = (x.encode() if isinstance(x, str) else x for x in map(record.get, names))
    return first, second


def _without_marks(pair: Pair) -> Pair:
    article, abstract = pair
    return article, abstract.replace(b'<S>', b'').replace(b'</S>', b'')
