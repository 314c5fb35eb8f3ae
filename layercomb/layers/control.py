"""Layers that loop: over depth (`Repeat`), over positions (`Chunk`), over values (`Map`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.base import Arrays, Layer, Mode, Tree, Wrapper, fold
from layercomb.layers.cotangents import zero_cts, zeros_once
from layercomb.layers.counted import along_length, put_counted, take_counted
from layercomb.layers.decisions import DECISIONS, put_decisions, take_decisions
from layercomb.layers.fields import Size
from layercomb.layers.shares import add_aux, by_share, how_many, passes_on, shares
from layercomb.layers.wiring import check_inputs, check_outputs
from layercomb.shapes import Signature, describe


class Repeat(Wrapper):
    """A block n times in series, as one `lax.scan` over weights stacked on a leading axis.

    Compile time and program size do not grow with `n`. In ``PREDICT`` it runs block by block, and
    its state is one subtree a block (``'0'``, ``'1'`` …), because a scan would copy the caches;
    `transforms.unstack` gives the same model with one weight subtree a block as well.

    Attributes:
      layer: the block; it must put back as many values as it takes, of the same shapes and dtypes.
      n: how many times.
      shared: one set of weights for all (as in ALBERT, or the Universal Transformer).

    >>> from layercomb import tl, shape_dtype
    >>> import jax
    >>> weights, _ = tl.Repeat(tl.Dense(4), 3).init((shape_dtype((2, 4)),), jax.random.key(0))
    >>> weights['kernel'].shape
    (3, 4, 4)
    """

    carries_counted = True

    n: Size = 1
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer.n_in != self.layer.n_out:
            raise TypeError(
                f'{type(self).__name__}: a block must put back as many values as it takes, this '
                f'one takes {self.layer.n_in} and puts back {self.layer.n_out}'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
        """Weights stacked on a leading axis (not if shared); state stacked, or one a block."""
        return self._build(signature, rng, mode)[1:]

    def _build(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        made = []

        def one(key: jax.Array) -> tuple[Tree, Tree]:
            outputs, weights, state = self.layer._build(signature, key, mode)
            made.append(outputs)
            return weights, state

        if self.shared:
            first, rest = jax.random.split(rng)
            weights = self.layer._build(signature, first, mode)[1]
            _, state = jax.vmap(one)(jax.random.split(rest, self.n))
        else:
            weights, state = jax.vmap(one)(jax.random.split(rng, self.n))
        if describe(made[0]) != describe(signature):
            raise TypeError(
                f'{type(self).__name__}: a block must keep shapes and dtypes, this one turns '
                f'({describe(signature)}) into ({describe(made[0])})'
            )
        if mode is Mode.PREDICT and state:
            state = {str(i): jax.tree.map(lambda x, i=i: x[i], state) for i in range(self.n)}
        return signature, weights, state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Runs the blocks in order; block `i` draws from `rng` folded with `i`."""
        if mode is Mode.PREDICT:
            return self._apply_one_by_one(weights, state, inputs, rng)
        if isinstance(state.get('0'), dict):
            raise ValueError(
                f'{type(self).__name__}: this state was made for decoding, a block at a time: init '
                f'without mode=PREDICT to apply in {mode.name}'
            )

        state, counted = take_counted(state)  # the same for all blocks

        def step(values: Arrays, xs: Any) -> tuple[Arrays, Tree]:
            its_weights, its_state, i = xs
            its_weights = weights if self.shared else its_weights
            its_state = put_counted(its_state, counted)
            made, new = self.layer.apply(
                its_weights, its_state, values, rng=fold(rng, i), mode=mode
            )
            return made, take_counted(new)[0]

        scanned = None if self.shared else weights
        numbers = jnp.arange(self.n, dtype=jnp.int32)
        return jax.lax.scan(step, tuple(inputs), (scanned, state, numbers))

    def _apply_one_by_one(
        self, weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array | None
    ) -> tuple[Arrays, Tree]:
        new_state, values = dict(state), tuple(inputs)
        for i in range(self.n):
            values, new = self.layer.apply(
                self.block_weights(weights, i),
                state.get(str(i), {}),
                values,
                rng=fold(rng, i),
                mode=Mode.PREDICT,
            )
            if new:
                new_state[str(i)] = new
        return values, new_state

    def block_weights(self, weights: Tree, i: int) -> Tree:
        """The weights of block `i`."""
        return weights if self.shared else jax.tree.map(lambda w: w[i], weights)

    def block_state(self, state: Tree, i: int) -> Tree:
        """The state of block `i` in training's, which is stacked even where weights are shared."""
        return jax.tree.map(lambda x: x[i], state)


class Remat(Wrapper):
    """Computes its layer again in the backward pass instead of keeping what is inside.

    Under `Repeat` this makes the memory of training grow with depth by the block's inputs alone.
    """

    carries_counted = True

    recomputes = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Applies the layer under `jax.checkpoint`, unless there is no backward pass."""
        if mode is Mode.PREDICT:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        def run(weights: Tree, state: Tree, inputs: Arrays, rng: Any) -> tuple[Arrays, Tree]:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)

        return jax.checkpoint(run)(weights, state, tuple(inputs), rng)

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """The layer's own: in one pass there is nothing to compute again."""
        return self.layer.apply_and_grad(
            weights, state, inputs, cts, rng=rng, mode=mode, state_cts=state_cts
        )


class Map(Wrapper):
    """One layer, with one set of weights, on each of `n` groups of values.

    State (running statistics) is threaded from one to the next, and auxiliary losses are summed; in
    ``PREDICT`` each has its own.

    >>> from layercomb import tl
    >>> tl.Map(tl.Dense(4), 3).n_in
    3
    """

    carries_counted = True

    n: Size = 1

    n_in = property(lambda self: self.n * self.layer.n_in)
    n_out = property(lambda self: self.n * self.layer.n_out)

    def inner_signature(self, signature):
        """Of the first group."""
        return self._groups(signature)[0]

    def init(self, signature, rng, mode=Mode.TRAIN):
        """The layer's weights, from the first group; every group must have the same signature."""
        groups = self._groups(signature)
        for group in groups[1:]:
            if describe(group) != describe(groups[0]):
                raise TypeError(
                    f'Map: one layer on values of one shape, got ({describe(groups[0])}) and '
                    f'({describe(group)})'
                )
        weights, state = self.layer.init(groups[0], rng, mode)
        if mode is Mode.PREDICT and state:
            state = {str(i): jax.tree.map(jnp.copy, state) for i in range(self.n)}
        return weights, state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Applies the layer to each group; group `i` draws from `rng` folded with `i`."""
        check_inputs(self, inputs)
        apart = mode is Mode.PREDICT
        found = state.get(DECISIONS, {})
        state, counted = take_counted({k: v for k, v in state.items() if k != DECISIONS})
        state = state if apart else add_aux({}, state, 0.0)
        outputs: Arrays = ()
        kept: Tree = {}
        decisions: Tree = {}
        for i, group in enumerate(self._groups(inputs)):
            its_state = put_decisions(
                state.get(str(i), {}) if apart else state, found.get(str(i), {})
            )
            its_state = put_counted(its_state, counted)
            made, new = self.layer.apply(weights, its_state, group, rng=fold(rng, i), mode=mode)
            outputs += check_outputs(self.layer, made)
            new, its_decisions = take_decisions(take_counted(new)[0])
            if apart and new:
                kept[str(i)] = new
            if not apart:
                state = add_aux(state, new, 1.0)
            if its_decisions:
                decisions[str(i)] = its_decisions
        new_state = kept if apart else state
        if mode is Mode.RECORD and decisions:
            new_state = {**new_state, DECISIONS: decisions}
        return outputs, new_state

    def block_weights(self, weights: Tree, i: int) -> Tree:
        """The weights for group `i`: one set for all."""
        return weights

    def block_state(self, state: Tree, i: int) -> Tree:
        """The state for group `i` in training's: what was threaded through all."""
        return state

    def _groups(self, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        k = self.layer.n_in
        return [values[i * k : (i + 1) * k] for i in range(self.n)]


class Chunk(Wrapper):
    """Runs a position-wise layer a piece at a time along the length (axis 1), in constant memory.

    The forward pass holds what is inside the layer for one piece only, and so does the backward,
    which computes each piece again. What `chunk_len` does not divide runs as a shorter last piece.
    An auxiliary loss is the mean of the pieces', each by its share of the positions, or of those
    that count if the layer that has the loss is told which do.

    Attributes:
      layer: works on each position by itself, as feed-forwards, norms, dropout and losses do.
      chunk_len: the length of a piece.

    Raises:
      TypeError: if the layer mixes positions (attention, convolution, batch norm; also joining,
        cutting or sharing a dropout mask along axis 1 of (B, L, D), counted from either end).

    References:
      Kitaev et al., Reformer, 2020, section 3, https://arxiv.org/abs/2001.04451
    """

    carries_counted = True

    chunk_len: Size = 128

    recomputes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        mixer = _find_mixer(self.layer)
        if mixer is not None:
            raise TypeError(
                f'Chunk: {type(mixer).__name__} mixes positions, so its result would depend on '
                'where the pieces end: chunk only what works on each position by itself'
            )

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Applies the layer piece by piece; piece `i` draws from `rng` folded with `i`."""
        length = self._length(inputs)
        if length <= self.chunk_len:
            return self.layer.apply(weights, state, tuple(inputs), rng=rng, mode=mode)
        n = length // self.chunk_len
        found, state, counted = _parts(state, inputs)
        pieces, rest = _cut((tuple(inputs), counted), n, self.chunk_len)
        n_counted = how_many(counted)
        state = add_aux({}, state, 0.0)

        def one(state: Tree, weights: Tree, xs: Any) -> tuple[Tree, Any]:
            (values, its_counted), i, decisions = xs
            its_state = put_counted(put_decisions(state, decisions), its_counted)
            outputs, new = self.layer.apply(weights, its_state, values, rng=fold(rng, i), mode=mode)
            new, decisions = take_decisions(take_counted(new)[0])
            share = values[0].shape[1] / length
            state = add_aux(state, new, share, shares(its_counted, n_counted))
            return state, (outputs, decisions)

        again = jax.checkpoint(one, prevent_cse=False)  # a scan separates the passes by itself
        state, (outputs, decisions) = jax.lax.scan(
            lambda state, xs: again(state, weights, xs),
            state,
            (pieces, jnp.arange(n, dtype=jnp.int32), found.get('pieces', {})),
        )
        taken = {'pieces': decisions} if decisions else {}
        outputs = jax.tree.map(_join, outputs)
        if rest is not None:
            xs = (rest, jnp.int32(n), found.get('rest', {}))
            state, (tail, decisions) = jax.checkpoint(one)(state, weights, xs)
            if decisions:
                taken['rest'] = decisions
            outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), outputs, tail)
        if mode is Mode.RECORD and taken:
            state = {**state, DECISIONS: taken}
        return outputs, state

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Outputs and gradients of one piece after the other, each computed once."""
        length = self._length(inputs)
        given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
        if length <= self.chunk_len:
            return self.layer.apply_and_grad(weights, state, inputs, cts, **given)
        found, plain, counted = _parts(state, inputs)
        if passes_on(plain):  # a piece needs the new state of the one before
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        n, n_counted = length // self.chunk_len, how_many(counted)

        def one(total: Tree, at: Any, size: int, decisions: Tree) -> tuple[Tree, Any]:
            values, its_cts, its_counted = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, at * self.chunk_len, size, 1),
                (tuple(inputs), tuple(cts), counted),
            )
            outputs, d_values, d = self.layer.apply_and_grad(
                weights,
                put_counted(put_decisions(plain, decisions), its_counted),
                values,
                its_cts,
                rng=fold(rng, at),
                mode=mode,
                state_cts=by_share(state_cts, size / length, shares(its_counted, n_counted)),
            )
            return jax.tree.map(jnp.add, total, d), (tuple(outputs), tuple(d_values))

        def put(whole: Any, made: Any, at: Any) -> Any:
            def update(x: jax.Array, piece: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, piece, at * self.chunk_len, 1)

            return jax.tree.map(update, whole, made)

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            (total, whole), (at, decisions) = carry, xs
            total, made = one(total, at, self.chunk_len, decisions)
            return (total, put(whole, made, at)), None

        # Cut where they lie and put where they belong, so that no copy in pieces exists.
        pieces, total = found.get('pieces', {}), zero_cts(weights)
        first = jax.tree.map(lambda x: x[0], pieces)
        _, made = jax.eval_shape(lambda: one(total, jnp.int32(0), self.chunk_len, first))
        known = next((ct for ct in cts if ct is not None), None)
        whole = jax.tree.map(
            lambda x: zeros_once((x.shape[0], length, *x.shape[2:]), x.dtype, known), made
        )
        numbers = jnp.arange(n, dtype=jnp.int32)
        (total, whole), _ = jax.lax.scan(step, (total, whole), (numbers, pieces))
        if length % self.chunk_len:
            rest = found.get('rest', {})
            total, made = one(total, jnp.int32(n), length % self.chunk_len, rest)
            whole = put(whole, made, jnp.int32(n))
        outputs, d_inputs = whole
        return outputs, d_inputs, total

    def _length(self, inputs: Arrays) -> int:
        lengths = {x.shape[1] if x.ndim > 1 else -1 for x in inputs}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f'Chunk cuts axis 1 of all its inputs, which must be of one length, got '
                f'({describe(inputs)})'
            )
        return lengths.pop()


def _cut(values: Any, n: int, chunk_len: int) -> tuple[Any, Any]:
    """A tree's n pieces of chunk_len on a leading axis, and what is left over."""
    whole = n * chunk_len

    def pieces(x: jax.Array) -> jax.Array:
        x = x[:, :whole].reshape(x.shape[0], n, chunk_len, *x.shape[2:])  # (B, n, C, …)
        return jnp.moveaxis(x, 1, 0)  # (n, B, C, …)

    is_rest = whole < jax.tree.leaves(values)[0].shape[1]
    rest = jax.tree.map(lambda x: x[:, whole:], values) if is_rest else None
    return jax.tree.map(pieces, values), rest


def _join(pieces: jax.Array) -> jax.Array:
    x = jnp.moveaxis(pieces, 0, 1)  # (B, n, C, …)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])  # (B, n·C, …)


def _parts(state: Tree, inputs: Arrays) -> tuple[Tree, Tree, Tree]:
    """Decisions of pieces, the rest of a state, and which positions of the inputs count."""
    plain, counted = take_counted({k: v for k, v in state.items() if k != DECISIONS})
    return state.get(DECISIONS, {}), plain, along_length(counted, inputs[0].shape[:2])


def _find_mixer(layer: Layer) -> Layer | None:
    """The first layer inside whose outputs mix positions."""
    if layer.mixes_positions:
        return layer
    return next((m for m in map(_find_mixer, layer.sublayers) if m is not None), None)
