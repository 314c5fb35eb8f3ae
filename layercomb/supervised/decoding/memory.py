"""`decoding_bytes`: the memory that decoding takes, told before it begins."""

from __future__ import annotations

import jax

from layercomb import trees
from layercomb.checks import Size, check_value
from layercomb.errors import UsageError
from layercomb.model import Model
from layercomb.shapes import shape_dtype
from layercomb.supervised.decoding.prompts import checked, max_len
from layercomb.supervised.decoding.reading.ingesting import fresh_state
from layercomb.transforms import buffers


def decoding_bytes(model: Model, n_positions: int) -> dict[str, int]:
    """How many bytes a process takes that decodes one row.

    The compiled programs are not among them: they take about 5 MB a layer.

    Args:
      model: a language model with weights.
      n_positions: how many positions the row has in the end, its prompt included.

    Returns:
      ``weights``; ``caches``, what the model keeps of the positions; and ``process``, what this
      process has besides the weights: Python, JAX, and what else was done in it. The last is left
      out where the weights are not in the memory of a CPU, or the system does not tell.

    Raises:
      TypeError, UsageError: as `decoding.generate`.
    """
    net, weights, state = checked(model)
    n_positions = check_value('decoding_bytes', 'n_positions', n_positions, Size)
    limit = max_len(net)
    if limit is not None and n_positions > limit:
        raise UsageError(
            f"{n_positions} positions were asked for, and the model's max_len is {limit}: ask for "
            'fewer'
        )
    signature = (shape_dtype((1, n_positions), 'int32'),)
    caches = jax.eval_shape(lambda: fresh_state(net, state, signature))
    taken = {'weights': trees.n_bytes(weights), 'caches': trees.n_bytes(caches)}
    resident = buffers.resident_bytes()
    if resident is not None and all(map(buffers.is_shareable, jax.tree.leaves(weights))):
        taken['process'] = max(0, resident - taken['weights'])
    return taken
