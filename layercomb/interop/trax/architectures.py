"""The models of Trax 1.4.1 that can be read: which one some weights are, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layercomb.errors import UsageError, one_line
from layercomb.interop.trax.flat_weights import Shape
from layercomb.interop.trax.parameters import Parameters
from layercomb.interop.trax.plans import Plan, table
from layercomb.interop.trax.reformers import reformer_lm
from layercomb.interop.trax.transformers import IN_BLOCK, transformer, transformer_lm

PLANS: dict[str, Callable[[list[Shape], Parameters], Plan]] = {
    'TransformerLM': transformer_lm,
    'Transformer': transformer,
    'ReformerLM': reformer_lm,
}


def plan(model: str, shapes: Sequence[Shape], known: Parameters) -> Plan:
    """How a model is read from weights of the given shapes.

    Args:
      model: the name of the model in Trax.
      shapes: of all weights, in the order of Trax.
      known: what else is known.

    Raises:
      UsageError: if something is not known that weights do not tell, or the weights are too few
        or too strange to be those of the model.
    """
    known.check(model)
    if len(shapes) < 8 or len(shapes[0]) != 2 or not all(map(all, shapes)):
        raise UsageError(f'these {len(shapes)} weights are not those of a {model}: check the file')
    try:
        return PLANS[model](list(shapes), known)
    except (TypeError, ValueError) as e:
        raise UsageError(f'this {model} cannot be made here: {one_line(e)}') from None


def guess(shapes: Sequence[Shape]) -> str | None:
    """The model whose weights these look like, by their ends and their number; None for none."""
    if len(shapes) < 8 or len(shapes[0]) != 2 or len(shapes[-2]) != 2:
        return None
    width = shapes[0][1]
    if shapes[-2][0] == 2 * width:
        return 'ReformerLM'
    if shapes[-2][0] != width or len(table(shapes[1])) != 2:
        return None
    return 'TransformerLM' if (len(shapes) - 6) % IN_BLOCK == 0 else 'Transformer'
