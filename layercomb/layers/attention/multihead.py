"""`MultiHead`: projections around an attention core.

A multi-head layer is a combinator of parts, each of which can be replaced: ``query``, ``key``,
``value`` (B, L, D) → (B, H, L, K), a ``core`` that attends, and ``output`` back to (B, L, D). Keys
and values may have fewer heads, G. Shape letters: B batch, L length, D d_model, H heads, G heads of
keys and values, K head depth, M memory length.
"""

from __future__ import annotations

from typing import Any

import jax

from layercomb.layers.attention.heads import HeadByHead, goes_by_head
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.core.checks import check_inputs
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import set_field
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.layers.state.counted import take_counted
from layercomb.shapes import nearest_divisor
from layercomb.trees import Tree


class MultiHead(Combinator):
    """Base of multi-head layers: a part that is None is made by `parts` from the other fields.

    Attributes:
      reads: the number of the input that each projection reads in `route`.
    """

    def parts(self) -> dict[str, Layer]:
        """The default query, key, value, core and output, made from the other fields."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field, part in self.parts().items():
            if getattr(self, field) is None:
                set_field(self, field, part)
        super().__post_init__()

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields; parts made from these are made again.

        Args:
          **changes: fields and their new values.
        """
        made = {f: None for f, part in self.parts().items() if getattr(self, f) == part}
        return super().replace(**{**made, **changes})

    position_wise = property(of_sublayers)
    # Without an annotation, so that it is no field.
    reads = {'query': 0, 'key': 0, 'value': 0}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Applies the parts by `route`; in ``RECORD`` head by head where `goes_by_head` holds.

        ``RECORD`` is the mode of the forward pass of a reversible stack.
        """
        if mode is not Mode.RECORD or not goes_by_head(self, weights, inputs):
            return super().apply(weights, state, inputs, rng=rng, mode=mode)
        check_inputs(self, inputs)
        told = take_counted(state)[1]
        return HeadByHead(self, tuple(inputs), mode, told).outputs(weights, state, rng)


@one_pass.register(MultiHead, of=('apply',))
def _by_head(layer, weights, state, inputs, cts, *, rng, mode, state_cts):
    """Computes head by head where `goes_by_head` holds, as ``RECORD`` does."""
    check_inputs(layer, inputs)
    if cts[0] is None or not goes_by_head(layer, weights, inputs):
        given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
        return one_pass.default(layer, weights, state, inputs, cts, **given)
    (ct,) = cts
    told = take_counted(state)[1]
    return HeadByHead(layer, tuple(inputs), mode, told).gradients(weights, state, ct, rng)


def heads(layer: Any, core: Layer) -> dict[str, Layer]:
    """The default parts around a core: three projections to heads, and one from heads.

    Args:
      layer: has n_heads, n_kv_heads, d_head, qkv_bias and out_bias.
      core: (B, H, L, K), (B, G, M, K), (B, G, M, K) → (B, H, L, K).

    Returns:
      The layers by field: query, key, value, core and output.

    Raises:
      ValueError: if G does not divide H, naming the nearest number that does.
    """
    query = SplitHeads(layer.n_heads, layer.d_head, layer.qkv_bias)
    shared = shared_heads(layer)
    output = MergeHeads(layer.out_bias)
    return {'query': query, 'key': shared, 'value': shared, 'core': core, 'output': output}


def shared_heads(layer: Any) -> SplitHeads:
    """The default projection to keys or to values, which H/G heads of queries share.

    Args:
      layer: has n_heads, n_kv_heads, d_head and qkv_bias.

    Raises:
      ValueError: if G does not divide H, naming the nearest number that does.
    """
    n_heads, n_shared = layer.n_heads, layer.n_kv_heads or layer.n_heads
    if n_heads % n_shared:
        raise ValueError(
            f'{type(layer).__name__}: n_kv_heads={n_shared} does not divide n_heads={n_heads}: use '
            f'{nearest_divisor(n_heads, n_shared)}'
        )
    return SplitHeads(n_shared, layer.d_head, layer.qkv_bias, group=n_heads // n_shared)


def attend(layer: Any, call: Any, x: Any, memory: Any, *more: Any) -> tuple[Any, ...]:
    """The route that multi-head layers share: attention from `x` to `memory`.

    Args:
      layer: a `MultiHead` layer with query, key, value, core, output, rotary, query_norm and
        key_norm.
      call: as of `Combinator.route`.
      x: (B, L, D).
      memory: (B, M, E).
      *more: the other inputs of the core, e.g. a mask (B, M) bool, True = a real key.

    Returns:
      A tuple of the output, (B, L, D).

    Raises:
      ValueError: if queries and keys have different depths.
    """
    at = layer.keys.index
    (q,) = call(at('query'), (x,))
    (k,) = call(at('key'), (memory,))
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f'{type(layer).__name__}: queries of a sequence {x.shape[-1]} wide and keys of one '
            f'{memory.shape[-1]} wide have {q.shape[-1]} and {k.shape[-1]} features a '
            'head: say d_head='
        )
    (v,) = call(at('value'), (memory,))
    if layer.query_norm is not None:
        (q,) = call(at('query_norm'), (q,))
    if layer.key_norm is not None:
        (k,) = call(at('key_norm'), (k,))
    if layer.rotary is not None:
        q, k = call(at('rotary'), (q, k))
    (y,) = call(at('core'), (q, k, v, *more))
    return call(at('output'), (y, x))


def dropout_arguments(rate: float, rng: jax.Array | None, mode: Mode) -> dict[str, Any]:
    """The arguments of an attention function for dropout: none outside training.

    Args:
      rate: the dropout rate of the layer.
      rng: a typed key; or None.
      mode: the mode of `apply`.

    Returns:
      ``dropout_rate`` and ``rng``, or an empty dict.

    Raises:
      ValueError: in training with dropout, without a key.
    """
    if not rate or not mode.is_training:
        return {}
    if rng is None:
        raise ValueError(
            f'attention with dropout={rate} draws in training: pass rng=jax.random.key(…) to apply'
        )
    return {'dropout_rate': rate, 'rng': rng}
