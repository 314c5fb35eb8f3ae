"""What a run is made of, kept in each checkpoint: no run goes on as another one unnoticed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError, UsageWarning
from layercomb.layers.base import Layer
from layercomb.shapes import describe
from layercomb.supervised import updates
from layercomb.supervised.batches import Batch, n_rows
from layercomb.supervised.tasks import TrainTask
from layercomb.trees import Tree
from layercomb.version import __version__

Fingerprint = dict[str, Any]  # as JSON can hold it

# What may differ from the run so far, if it is allowed by name.
PARTS = ('model', 'weights', 'loss', 'optimizer', 'trainable', 'data', 'batch_size', 'seed')

_OF_THE_SEED = 'of the seed'
_ROWS = 64  # of the first batch, by which data is known
_SAMPLE = 1024  # numbers of each weight, by which given weights are known


def fingerprint(
    net: Layer,
    task: TrainTask,
    optimizer: Any,
    trainable: Tree,
    given: Tree | None,
    first: Batch,
    seed: int,
) -> Fingerprint:
    """What a run is made of, as values: no names of modules or files, so that code may move.

    Args:
      net: the model; its functions count by their names.
      task: what it trains on.
      optimizer: the task's, behind clipping; known by the jaxprs of `init` and `update`.
      trainable: the weights that train, as `jax.ShapeDtypeStruct`.
      given: the weights of the Model that the run starts from; None if they come from the seed.
      first: the first batch of the data, by which that is known.
      seed: of the run.
    """
    return {
        'versions': {'layercomb': __version__, **_versions()},
        'model': _text(net),
        'weights': _OF_THE_SEED if given is None else _weights(given),
        'loss': _text(task.loss),
        'optimizer': _optimizer(optimizer, trainable),
        'trainable': _frozen(trainable),
        'data': _data(first),
        'batch_size': n_rows(first),
        'seed': int(seed),
    }


def check(
    where: str, then: Fingerprint | None, now: Fingerprint, allowed: Sequence[str]
) -> frozenset[str]:
    """The parts of a run that changed, all of which are allowed to.

    Args:
      where: the run's directory, for messages.
      then: the fingerprint in the checkpoint; None in one that an earlier version wrote.
      now: the present one.
      allowed: names out of `PARTS`.

    Raises:
      UsageError: if a part that may not change did.
    """
    if then is None:
        warnings.warn(
            f'{where}: its checkpoint does not say what the run was made of: it goes on unchecked, '
            'so make sure that model, data, loss, optimizer and seed are the same',
            UsageWarning,
            stacklevel=2,
        )
        return frozenset()
    found = {part: said for part in PARTS if (said := _difference(part, then, now))}
    refused = [part for part in found if part not in allowed]
    if refused:
        names = ','.join(refused)
        raise UsageError(
            f'{where} holds another run: {"; ".join(found[part] for part in refused)}{_by(then)}: '
            f'go on with what it was made of, choose another output_dir, or allow the change, '
            f'allow_changes={names!r} (--allow_changes {names})'
        )
    return frozenset(found)


def check_allowed(allow_changes: str | Iterable[str]) -> tuple[str, ...]:
    """Names of parts, from a sequence of them or a text with commas; 'all' is all of them.

    Raises:
      ValueError: for a name that is no part's, listing those there are.

    >>> check_allowed('data, seed')
    ('data', 'seed')
    """
    names = allow_changes.split(',') if isinstance(allow_changes, str) else allow_changes
    given = [name.strip() if isinstance(name, str) else name for name in names]
    given = [name for name in given if name != '']
    for name in given:
        if name not in (*PARTS, 'all'):
            raise ValueError(f'allow_changes: {name!r} is none of {", ".join(PARTS)}, all')
    return PARTS if 'all' in given else tuple(given)


def _difference(part: str, then: Fingerprint, now: Fingerprint) -> str | None:
    """How a part changed, in words; None if it did not."""
    if part not in then:  # which the version that wrote it did not know
        return None
    old, new = then[part], now[part]
    if old == new or (part == 'weights' and new == _OF_THE_SEED):
        return None
    if part == 'optimizer':
        return _of_optimizers(then, now)
    if part == 'data':
        return _of_data(old, new)
    if part in ('model', 'loss'):
        return f'{part} is {_cut(old, new)} there, {_cut(new, old)} here'
    if part == 'weights':
        return 'the Model brings other weights (give its layer alone to take those saved)'
    if part == 'trainable':
        return 'other weights train'
    return f'{part} is {old} there, {new} here'


def _of_optimizers(then: Fingerprint, now: Fingerprint) -> str | None:
    old, new = then['optimizer'], now['optimizer']
    was, wanted = old['rates'], new['rates']
    if was.keys() == wanted.keys() and was != wanted:
        changed = [
            f"the optimizer's {name.split('/')[-1]} is {was[name]:g} there, {wanted[name]:g} here"
            for name in sorted(was)
            if was[name] != wanted[name]
        ]
        return ', '.join(changed)
    if then['versions'] == now['versions']:
        return 'the optimizer makes other updates'
    if old['programs'] != new['programs']:
        versions = (f'{name} {version}' for name, version in then['versions'].items())
        warnings.warn(
            f'the checkpoint was made by {", ".join(versions)}, other versions than these, so the '
            'optimizer cannot be compared: make sure that it is the same',
            UsageWarning,
            stacklevel=2,
        )
    return None


def _of_data(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    if old['kinds'] != new['kinds']:
        return f'an example is ({old["kinds"]}) there, ({new["kinds"]}) here'
    both = list(zip(old['rows'], new['rows'], strict=False))  # a batch may have more rows now
    return None if all(a == b for a, b in both) else 'the data begins with other examples'


def _data(first: Batch) -> dict[str, Any]:
    """The kinds of arrays in an example, and checksums of the first examples."""
    arrays = [np.asarray(x) for x in first]
    kinds = describe([jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in arrays])
    n = min(n_rows(first), _ROWS)
    return {'kinds': kinds, 'rows': [_crc(x[i] for x in arrays) for i in range(n)]}


def _optimizer(optimizer: Any, trainable: Tree) -> dict[str, Any]:
    """The numbers that an optimizer keeps by name, and a digest of what it computes."""
    init, update = updates.traced(optimizer, trainable)
    digest = hashlib.sha256()
    for program in (init, update):
        digest.update(_no_addresses(str(program.jaxpr)).encode())
        for value in program.consts:
            digest.update(np.asarray(value).tobytes())
    values = updates.fresh_hyperparams(optimizer, trainable)
    rates = {path: float(value) for path, value in values.items()}
    return {'programs': digest.hexdigest()[:16], 'rates': rates}


def _weights(given: Tree) -> str:
    """A checksum of a part of each weight, quick to make of any number of them."""
    flat = trees.flatten(given)
    samples = [np.asarray(x.reshape(-1)[:_SAMPLE]) for x in flat.values()]
    return f'{_crc(samples):08x}'


def _frozen(trainable: Tree) -> str:
    """Which weights do not train: None stands in their places."""
    paths = [path for path, x in trees.flatten(trainable).items() if x is None]
    return f'all but {len(paths)}, {zlib.crc32(" ".join(paths).encode()):08x}'


def _crc(arrays: Iterable[Any]) -> int:
    checksum = 0
    for x in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(x).tobytes(), checksum)
    return checksum


def _text(layer: Layer) -> str:
    return _no_addresses(re.sub(r'\s*\n\s*', ' ', repr(layer)))


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
    return {name: importlib.metadata.version(name) for name in ('jax', 'optax')}
