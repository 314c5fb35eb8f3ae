"""Resuming from a checkpoint, also with changes that were made on purpose."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError, UsageWarning
from layercomb.layers.facts import processes
from layercomb.supervised.batches import Batches
from layercomb.supervised.fingerprint import OF_THE_SEED, Fingerprint, check
from layercomb.supervised.updates import first_numbers, with_hyperparams
from layercomb.trees import Tree

if TYPE_CHECKING:
    from layercomb.supervised.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a resumed run starts from.

    Attributes:
      step: how many steps were taken.
      weights: the model's weights.
      state: the model's state.
      opt_state: the optimizer's state; None if it must be initialised anew.
      key: the random key of the run; None if the seed changed, so that the key comes from it.
    """

    step: int
    weights: Tree
    state: Tree
    opt_state: Any
    key: jax.Array | None


def resume(
    checkpoints: Checkpoints,
    made_of: Fingerprint,
    allowed: Sequence[str],
    abstract: dict[str, Tree],
    optimizer: Any,
    trainable: Tree,
    batches: Batches,
) -> Resumed | None:
    """Reads the last checkpoint of a run, and moves the data to its saved position.

    Allowed changes take effect. If only hyperparameters of the optimizer changed, its moments are
    kept; if it changed otherwise, its state is initialised anew, with a warning. Changed data
    starts from its beginning. Batches of another size start at the first unseen example.

    Args:
      checkpoints: of the run.
      made_of: what the run is made of now; it is told what weights the run began with.
      allowed: parts of it that may have changed, out of `fingerprint.PARTS`.
      abstract: 'weights', 'state' and 'opt_state' as `jax.ShapeDtypeStruct`.
      optimizer: what made `abstract['opt_state']`.
      trainable: the weights that train, as `jax.ShapeDtypeStruct`.
      batches: of the data; none may have been taken yet.

    Returns:
      What the run starts from; None if there is no checkpoint.

    Raises:
      UsageError: if the run was another one, the checkpoint is damaged, or processes do not see
        the same one.
    """
    step = _latest(checkpoints)
    if step is None:
        return None
    where = repr(str(checkpoints.directory.parent))
    with processes.hearing():
        record, kinds = checkpoints.record(step)
        changed = check(where, record.get('made_of'), made_of, allowed)
    wanted = dict(abstract)
    keeps = not changed & {'optimizer', 'trainable'} or (
        _same_form(kinds, abstract['opt_state']) and _only_hyperparams(record, made_of)
    )
    if not keeps:
        warnings.warn(
            f'{where}: the state of the optimizer (moments, counts of steps) begins anew, since '
            'the optimizer is another one, or other weights train',
            UsageWarning,
            stacklevel=2,
        )
        del wanted['opt_state']
    saved, _ = checkpoints.restore(step, wanted)
    checkpoints.remember_best(record)
    if not changed & {'model', 'trainable'}:
        checkpoints.remember_frozen(record)
    if made_of['weights'] == OF_THE_SEED:  # a layer alone takes the weights that are saved
        made_of['weights'] = (record.get('made_of') or {}).get('weights', OF_THE_SEED)
    opt_state = saved.get('opt_state')
    if opt_state is not None and 'optimizer' in changed:
        opt_state = with_hyperparams(opt_state, first_numbers(optimizer, trainable))
    if 'data' not in changed:
        with processes.hearing():
            batches.go_to(record['data'], resized='batch_size' in changed)
    key = None
    if 'seed' not in changed:
        data = jnp.array(record['key'], jnp.uint32)
        key = jax.random.wrap_key_data(data, impl=record['key_impl'])
    return Resumed(step, saved['weights'], saved['state'], opt_state, key)


def _latest(checkpoints: Checkpoints) -> int | None:
    """The last step, which all processes must see."""
    mine = checkpoints.latest()
    seen = processes.from_all(np.int32(-1 if mine is None else mine)).tolist()
    other = next((i for i, step in enumerate(seen) if step != seen[0]), None)
    if other is not None:
        first, its = ('none' if s < 0 else f'step {s}' for s in (seen[0], seen[other]))
        raise UsageError(
            f'of the checkpoints in {str(checkpoints.directory)!r}, process 0 sees {first} as the '
            f'last, process {other} {its}: give an output_dir on a file system that all share'
        )
    return mine


def _only_hyperparams(record: dict[str, Any], made_of: Fingerprint) -> bool:
    """Whether only hyperparameters differ among the numbers in an optimizer's initial state."""
    was, wanted = (each['optimizer']['numbers'] for each in (record['made_of'], made_of))
    changed = {path for path in was.keys() | wanted.keys() if was.get(path) != wanted.get(path)}
    return all('hyperparams/' in path for path in changed)


def _same_form(kinds: dict[str, Any], opt_state: Any) -> bool:
    """Whether an optimizer's state has the arrays that were saved."""
    from layercomb import checkpoints

    return kinds.get('opt_state', {}) == checkpoints.kinds(opt_state)
