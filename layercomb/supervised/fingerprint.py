"""What a run is made of: kept in each checkpoint, and compared when the run resumes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError, UsageWarning
from layercomb.layers.core.layer import Layer
from layercomb.shapes import describe
from layercomb.supervised import updates
from layercomb.supervised.batches import Batch, made, n_rows
from layercomb.supervised.tasks import TrainTask
from layercomb.trees import Tree
from layercomb.version import __version__

Fingerprint = dict[str, Any]  # as JSON can hold it

# What may differ from the run so far, if it is allowed by name.
PARTS = ('model', 'loss', 'optimizer', 'trainable', 'data', 'batch_size', 'seed')

OF_THE_SEED = 'of the seed'  # what a fingerprint says of weights that no Model brought
_ROWS = 64  # rows of the first batch that are compared
_SAMPLE = 1024  # numbers of each given weight that are compared


def fingerprint(
    net: Layer,
    task: TrainTask,
    optimizer: Any,
    trainable: Tree,
    given: Tree | None,
    first: Batch,
    seed: int,
) -> Fingerprint:
    """What a run is made of, as values. Names of modules and files are left out: code may move.

    Args:
      net: the model; functions in it are compared by name.
      task: what it trains on.
      optimizer: the task's optimizer after clipping. It is compared by the jaxprs of `init` and
        `update`, and by the numbers in its initial state.
      trainable: the weights that train, as `jax.ShapeDtypeStruct`.
      given: the weights of the Model that the run starts from; None if they come from the seed.
      first: the first batch of the data, which is compared by its rows. Data with an `identity()`,
        as this library's has, is also compared by that: a dict that JSON can hold, whose 'rows' is
        the batch size.
      seed: of the run.

    Returns:
      A dict that JSON can hold: 'versions', 'weights', and a value for each of `PARTS`.
    """
    known = identity(task.data) or {}
    rows = known.pop('rows', None)
    return {
        'versions': {'layercomb': __version__, **_versions()},
        'model': _text(net) + (f'\ndenser={task.denser}' if task.denser else ''),
        'weights': OF_THE_SEED if given is None else _weights(given),
        'loss': _text(task.loss),
        'optimizer': _optimizer(optimizer, trainable),
        'trainable': _frozen(trainable),
        'data': {'known': known, **({'packed': True} if task.packed else {}), **_data(first)},
        'batch_size': n_rows(first) if rows is None else rows,
        'seed': int(seed),
    }


def check(
    where: str, then: Fingerprint | None, now: Fingerprint, allowed: Sequence[str]
) -> frozenset[str]:
    """Compares two fingerprints.

    Args:
      where: the run's directory, for messages.
      then: the fingerprint in the checkpoint; None if an earlier version wrote it without one.
      now: the present fingerprint.
      allowed: names out of `PARTS` that may differ.

    Returns:
      The names of the parts that changed, all of them allowed.

    Raises:
      UsageError: if a part changed that is not allowed to.
    """
    if then is None:
        warnings.warn(
            f'{where}: its checkpoint does not say what the run was made of: it goes on unchecked, '
            'so make sure that model, data, loss, optimizer and seed are the same',
            UsageWarning,
            stacklevel=2,
        )
        return frozenset()
    compared = (*PARTS, 'weights')
    found = {part: said for part in compared if (said := _difference(part, then, now))}
    refused = [part for part in found if part not in allowed]
    if refused:
        cure = 'go on with what it was made of, or choose another output_dir'
        names = ','.join(part for part in refused if part in PARTS)
        if names and 'weights' not in refused:
            cure += f', or allow the change, allow_changes={names!r} (--allow_changes {names})'
        said = '; '.join(found[part] for part in refused)
        raise UsageError(f'{where} holds another run: {said}{_by(then)}: {cure}')
    return frozenset(found)


def check_allowed(allow_changes: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of parts that may change.

    Args:
      allow_changes: a sequence of names, or a text with commas; 'all' stands for all `PARTS`.

    Raises:
      ValueError: for a name that is not in `PARTS`.

    >>> check_allowed('data, seed')
    ('data', 'seed')
    """
    names = allow_changes.split(',') if isinstance(allow_changes, str) else allow_changes or ()
    given = [name.strip() if isinstance(name, str) else name for name in names]
    given = [name for name in given if name != '']
    for name in given:
        if name not in (*PARTS, 'all'):
            raise ValueError(f'allow_changes: {name!r} is none of {", ".join(PARTS)}, all')
    return PARTS if 'all' in given else tuple(given)


def _difference(part: str, then: Fingerprint, now: Fingerprint) -> str | None:
    """How a part changed, in words; None if it did not."""
    if part not in then:  # the checkpoint is older than this part
        return None
    old, new = then[part], now[part]
    if old == new or (part == 'weights' and new == OF_THE_SEED):
        return None
    if part == 'model' and (_but_for_pieces(old, new) or _but_for_pieces(new, old)):
        return None
    if part == 'optimizer':
        return _of_optimizers(then, now)
    if part == 'data':
        return _of_data(old, new, then['batch_size'] == now['batch_size'])
    if part in ('model', 'loss'):
        return f'{part} is {_cut(old, new)} there, {_cut(new, old)} here'
    if part == 'weights':
        return 'the Model brings other weights (give its layer alone to take those saved)'
    if part == 'trainable':
        return 'other weights train'
    return f'{part} is {old} there, {new} here'


def _of_optimizers(then: Fingerprint, now: Fingerprint) -> str | None:
    old, new = then['optimizer'], now['optimizer']
    was, wanted = old['numbers'], new['numbers']
    if was.keys() == wanted.keys() and was != wanted:
        changed = (
            f"the optimizer's {name.split('/')[-1]} is {was[name]} there, {wanted[name]} here"
            for name in sorted(was)
            if was[name] != wanted[name]
        )
        return ', '.join(changed)
    of_other_weights = any(then[part] != now[part] for part in ('model', 'trainable'))
    if old['programs'] == new['programs'] or of_other_weights:
        return None
    others = [name for name in now['versions'] if name != 'layercomb']
    if all(then['versions'].get(name) == now['versions'][name] for name in others):
        return 'the optimizer makes other updates'
    versions = (f'{name} {version}' for name, version in then['versions'].items())
    warnings.warn(
        f'the checkpoint was made by {", ".join(versions)}, and these are others, so the optimizer '
        'cannot be compared: make sure that it is the same',
        UsageWarning,
        stacklevel=2,
    )
    return None


def _of_data(old: dict[str, Any], new: dict[str, Any], same_size: bool) -> str | None:
    was, is_now = ('packed' if x.get('packed') else 'not packed' for x in (old, new))
    if was != is_now:
        return f'rows are {was} there, {is_now} here'
    known, others = old['known'], new['known']
    if known.get('n') != others.get('n'):
        return f'the data has {known.get("n")} examples there, {others.get("n")} here'
    if known != others:
        parts = ({**x, 'rehearsal': None} for x in (known, others))
        if next(parts) == next(parts):
            return 'what is rehearsed is other text, or another share of it'
        return 'the data has other examples, or another order'
    if known and not (same_size and old['local_rows'] == new['local_rows']):
        return None  # its first batch on this host may be another one now
    if old['kinds'] != new['kinds']:
        return f'an example is ({old["kinds"]}) there, ({new["kinds"]}) here'
    if jax.process_index() > 0:
        return None  # what the first process began with is recorded
    both = zip(old['rows'], new['rows'], strict=False)  # a batch may have more rows now
    return None if all(a == b for a, b in both) else 'the data begins with other examples'


def identity(data: Any) -> dict[str, Any] | None:
    """The `identity()` of a data set or of one of its parents; None if none has one.

    Args:
      data: any data set; Grain's have ``parents``.
    """
    if hasattr(data, 'identity'):
        with made('an example of the data'):
            return dict(data.identity())
    found = (identity(parent) for parent in getattr(data, 'parents', ()))
    return next((one for one in found if one is not None), None)


def _data(first: Batch) -> dict[str, Any]:
    """The kinds of arrays in an example, and checksums of the first examples."""
    arrays = [np.asarray(x) for x in first]
    kinds = describe([jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays])
    rows = [_crc(x[i] for x in arrays) for i in range(min(n_rows(first), _ROWS))]
    return {'kinds': kinds, 'rows': rows, 'local_rows': n_rows(first)}


def _optimizer(optimizer: Any, trainable: Tree) -> dict[str, Any]:
    """The numbers that an optimizer's state begins with, and a digest of what it computes."""
    digest = hashlib.sha256()
    for program in updates.traced(optimizer, trainable):
        text = program.jaxpr.pretty_print(use_color=False)  # a terminal would be given colours
        digest.update(_no_addresses(text).encode())
        for value in _constants(program):
            digest.update(f'{value.dtype}{value.shape}'.encode())
            digest.update(_plain(value).tobytes())
    numbers = updates.first_numbers(optimizer, trainable).items()
    return {
        'programs': digest.hexdigest()[:16],
        'numbers': {path: _shown(np.asarray(value)) for path, value in numbers},
    }


def _constants(program: Any) -> Iterator[Any]:
    """The arrays that a closed jaxpr holds, and those that the jaxprs in it hold."""
    yield from (value if hasattr(value, 'dtype') else np.asarray(value) for value in program.consts)
    for equation in program.jaxpr.eqns:
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inside):
                yield from _constants(inside)


def _is_program(x: Any) -> bool:
    return hasattr(x, 'jaxpr') and hasattr(x, 'consts')


def _plain(value: Any) -> np.ndarray:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _shown(value: np.ndarray) -> str:
    return ','.join(f'{number:.7g}' for number in value.reshape(-1).tolist())


def _weights(given: Tree) -> str:
    """A checksum of `_SAMPLE` or so numbers spread over each weight, quick for large models."""
    flat = (x.reshape(-1) for x in trees.flatten(given).values())
    return f'{_crc(np.asarray(x[:: max(1, x.size // _SAMPLE)]) for x in flat):08x}'


def _frozen(trainable: Tree) -> str:
    """A digest of which weights are frozen: None stands in their places."""
    paths = [path for path, x in trees.flatten(trainable).items() if x is None]
    return f'all but {len(paths)}, {zlib.crc32(" ".join(paths).encode()):08x}'


def _crc(arrays: Iterable[Any]) -> int:
    checksum = 0
    for x in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(x).tobytes(), checksum)
    return checksum


def _text(layer: Layer) -> str:
    """A layer's text, without the places in modules and functions that its functions come from."""
    text = re.sub(r'[\w.]+\.<locals>\.', '', re.sub(r'\s*\n\s*', ' ', repr(layer)))
    return _no_addresses(re.sub(r'<(?:\w+\.)+(\w+) object', r'<\1 object', text))


def _but_for_pieces(text: str, other: str) -> bool:
    """Whether models are alike but for the lengths of pieces, where one of both is automatic.

    Pieces change how it is computed, as `loss_chunk_len` does, and not what.

    >>> _but_for_pieces("Chunk(Dense(4), 'auto')", 'Chunk(Dense(4), 1024)')
    True
    >>> _but_for_pieces('Chunk(Dense(4), 512)', 'Chunk(Dense(4), 1024)')
    False
    """
    words, others = (re.split(r"(, (?:'auto'|\d+))(?=[,)])", x) for x in (text, other))
    return len(words) == len(others) and all(
        a == b or ", 'auto'" in (a, b) for a, b in zip(words, others, strict=True)
    )


def _no_addresses(text: str) -> str:
    """Text without the addresses of functions in this process's memory."""
    return re.sub(r' at 0x[0-9a-f]+', '', text)


def _cut(text: str, other: str) -> str:
    """The part of a text around the first place at which it differs from another one.

    >>> _cut('Dense(4, use_bias=False)', 'Dense(5, use_bias=False)')
    'Dense(4, use_bias=False)'
    """
    differing = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    same = next(differing, min(len(text), len(other)))
    start = max(text.rfind(' ', 0, same), 0) if same > 40 else 0
    return ('… ' if start else '') + text[start:].strip()[:80]


def _by(then: Fingerprint) -> str:
    made_by = then['versions'].get('layercomb')
    return (
        '' if made_by == __version__ else f' (made by layercomb {made_by}, this is {__version__})'
    )


def _versions() -> dict[str, str]:
    """Versions and settings that jaxprs depend on."""
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'optax')}
    return {**versions, 'x64': 'on' if jax.config.read('jax_enable_x64') else 'off'}
