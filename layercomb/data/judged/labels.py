"""Texts with labels: examples for classifiers of whole texts."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data.adapted import Adapted, adapted
from layercomb.data.judged.rows import rows, text_of
from layercomb.data.packing import Arrays
from layercomb.data.sources import Mapped
from layercomb.data.tokenizers import Tokenizer
from layercomb.errors import UsageError, UsageWarning

_ME = 'labelled'
_TEXTS = (('text',), ('sentence',), ('text_a', 'text_b'))
Label = str | int


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled(Sequence[Arrays]):
    """Tokenized texts with labels, as examples of one shape; see `labelled`.

    Attributes:
      texts: of each text its ids (n,) int32, and where the second of two texts begins (n for one).
      targets: (N,) int32, the number of each text's label.
      labels: what the numbers stand for.
      length: L.
      typed: whether examples have the type of each token.
    """

    texts: tuple[tuple[np.ndarray, int], ...]
    targets: np.ndarray
    labels: tuple[Label, ...]
    length: int
    typed: bool

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(range(len(self))[index], self.__getitem__)
        ids, second = self.texts[index]
        inputs = np.zeros(self.length, np.int32)
        inputs[: len(ids)] = ids
        at = np.arange(self.length)
        mask = at < len(ids)
        types = ((second <= at) & mask).astype(np.int32)
        target, weight = np.asarray(self.targets[index]), np.ones((), np.float32)
        return (inputs, *(types,) * self.typed, mask, target, weight)

    @property
    def counts(self) -> dict[Label, int]:
        """How many texts each label has."""
        found = np.bincount(self.targets, minlength=len(self.labels)).tolist()
        return dict(zip(self.labels, found, strict=True))

    def __str__(self) -> str:
        each = ', '.join(f'{label} {n:,}' for label, n in self.counts.items())
        return f'{len(self):,} texts of {len(self.labels)} labels: {each}'


def labels(source: Any) -> tuple[Label, ...]:
    """Returns the different labels of a source, sorted: numbers by size, strings by letters.

    Args:
      source: as for `labelled`.

    Raises:
      UsageError: if a row has no label, labels are strings in some rows and integers in others, or
        there is one only.

    >>> labels([{'text': 'a', 'label': 'no'}, {'text': 'b', 'label': 'yes'}])
    ('no', 'yes')
    """
    return _sorted([_label(where, row) for where, row in rows('labels', source)])


@checked
def labelled(
    source: Any,
    tokenizer: Tokenizer,
    length: Size,
    *,
    labels: Sequence[str | int] | None = None,
    typed: bool = False,
) -> Labelled:
    """Returns texts with labels as examples for a classifier, see `transforms.classifier`.

    A row of the source has a `label`, a string or an integer, and a text: `text` or `sentence`; or
    two that belong together, `text_a` and `text_b`, which are read as one, with the tokenizer's end
    of a text between. The labels of a .csv or .tsv file are integers if all of them look so.

    All is tokenized at once, so that what is wrong shows before training. `str` tells how many
    texts each label has.

    Args:
      source: the path of a .jsonl (.gz), .json or .parquet file, or of a .csv or .tsv file whose
        first line names the columns; or a sequence of rows, dicts.
      tokenizer: see `data.Tokenizer`.
      length: L. Longer texts are cut, and keep a mark at their end; of two texts the longer is cut.
        A warning says how many.
      labels: what the numbers of the classes stand for; None for those that are found, sorted. Give
        those of training to data that is held out.
      typed: whether to give the type of each token too, 0 in the first text and 1 in the second.

    Returns:
      A sequence of (inputs, mask, target, loss_weight), (L,) int32, (L,) bool, () int32 and ()
      float32; if `typed`, the types (L,) int32 come after the inputs. `data.batches` makes batches
      of them.

    Raises:
      TypeError, ValueError: if an argument has the wrong type or range, or the source is empty.
      UsageError: if a row has no text or label, or one that is not among `labels`, naming the row.

    Warns:
      UsageWarning: if texts are cut.

    >>> from layercomb.data import ByteTokenizer
    >>> rows = [{'text': 'ab', 'label': 'x'}, {'text': 'c', 'label': 'y'}]
    >>> found = labelled(rows, ByteTokenizer(), 3)
    >>> print(found)
    2 texts of 2 labels: x 1, y 1
    >>> [x.tolist() for x in found[0]]
    [[97, 98, 0], [True, True, False], 0, 1.0]
    """
    known, found = adapted(tokenizer, _ME), rows(_ME, source)
    given = [_label(where, row) for where, row in found]
    names = _sorted(given) if labels is None else tuple(labels)
    if labels is None or not any(isinstance(name, str) for name in names):
        given = list(_as_integers(given))
    numbers = {name: i for i, name in enumerate(names)}
    texts, n_cut = [], 0
    for (where, row), label in zip(found, given, strict=True):
        if label not in numbers:
            raise UsageError(
                f'{_ME}: the label {label!r} of {where} is none of {_shown(names)}: check it, or '
                'give labels='
            )
        ids, second, was_cut = _tokens(where, row, known, length)
        texts.append((ids, second))
        n_cut += was_cut
    if n_cut:
        said = f'{_ME}: {n_cut} of {len(texts)} texts are longer than {length} tokens, and are cut'
        warnings.warn(said, UsageWarning, stacklevel=3)
    targets = np.array([numbers[label] for label in given], np.int32)
    return Labelled(tuple(texts), targets, names, length, typed)


def joined(
    texts: Sequence[str], tokenizer: Adapted, length: int | None
) -> tuple[np.ndarray, int, bool]:
    """One text, or two that belong together, as the tokens of one.

    Args:
      texts: one or two.
      tokenizer: checked.
      length: the most tokens; None for any number.

    Returns:
      The ids (n,) int32, where the second text begins (n if there is none), and whether something
      was cut.
    """
    parts = [tokenizer.encode(text) for text in texts]
    if len(parts) == 2:
        start = getattr(tokenizer.tokenizer, 'bos_id', None)
        start = _common_start(*parts) if start is None else start
        parts[1] = parts[1][1:] if parts[1].size and parts[1][0] == start else parts[1]
        if not parts[0].size or parts[0][-1] != tokenizer.eos_id:
            parts[0] = np.append(parts[0], np.int32(tokenizer.eos_id))
    total = sum(len(part) for part in parts)
    over = 0 if length is None else max(total - length, 0)
    if over and len(parts) == 2:
        a, b = (len(part) for part in parts)
        room = total - over
        a, b = (min(a, max(room - b, room - room // 2)), min(b, max(room - a, room // 2)))
        parts = [cut(part, n, tokenizer.eos_id) for part, n in zip(parts, (a, b), strict=True)]
    elif over:
        parts = [cut(parts[0], length, tokenizer.eos_id)]
    return np.concatenate(parts), len(parts[0]), bool(over)


def cut(ids: np.ndarray, limit: int | None, eos_id: int) -> np.ndarray:
    """The first ids of a text; a mark at its end stays there.

    Args:
      ids: (n,).
      limit: how many to keep; None for all.
      eos_id: the mark.
    """
    if limit is None or len(ids) <= limit:
        return ids
    return np.append(ids[: limit - 1], ids[-1:]) if ids[-1] == eos_id else ids[:limit]


def _common_start(one: np.ndarray, other: np.ndarray) -> int | None:
    """The token that both texts begin with, as BERT's [CLS], if they end with one token too."""
    same = one.size > 1 and other.size > 1 and one[0] == other[0] and one[-1] == other[-1]
    return int(one[0]) if same else None


def _tokens(
    where: str, row: dict[str, Any], tokenizer: Adapted, length: int
) -> tuple[np.ndarray, int, bool]:
    names = next((names for names in _TEXTS if all(name in row for name in names)), None)
    if names is None:
        wanted = ', '.join(' and '.join(map(repr, names)) for names in _TEXTS)
        raise UsageError(f'{_ME}: {where} has no text: name the columns one of {wanted}')
    ids, second, was_cut = joined(
        [text_of(_ME, where, row, name) for name in names], tokenizer, length
    )
    if not ids.size:
        raise UsageError(f'{_ME}: the tokenizer makes no token of the text of {where}: remove it')
    return ids, second, was_cut


def _label(where: str, row: dict[str, Any]) -> Label:
    label = row.get('label')
    label = label.item() if isinstance(label, np.generic) else label
    if isinstance(label, bool) or not isinstance(label, str | int) or label == '':
        raise UsageError(f"{_ME}: 'label' of {where} is {label!r:.40}: give a string or an integer")
    return label


def _sorted(found: Sequence[Label]) -> tuple[Label, ...]:
    found = _as_integers(found)
    kinds = collections.Counter(type(label).__name__ for label in found)
    if len(kinds) > 1:
        raise UsageError(
            f'{_ME}: labels are strings in {kinds["str"]} rows and integers in {kinds["int"]}: '
            'write all of them in one way'
        )
    names: Any = set(found)
    if len(names) < 2:
        raise UsageError(
            f'{_ME}: all {len(found)} rows have the label {found[0]!r}: give texts of two or more'
        )
    return tuple(sorted(names))


def _as_integers(found: Sequence[Label]) -> Sequence[Label]:
    """Labels as integers if all are whole numbers in decimal, as tables have them."""
    try:
        numbers = [int(label) for label in found]
    except ValueError:
        return found
    same = all(str(number) == str(label) for number, label in zip(numbers, found, strict=True))
    return numbers if same else found


def _shown(names: Sequence[Label]) -> str:
    return f'{", ".join(map(repr, names[:8]))}{" …" if len(names) > 8 else ""}'
