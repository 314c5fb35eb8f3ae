"""`Program`: layers of a decoding step as instructions, which one native call carries out.

XLA calls every layer by itself, and wakes threads for each. In a small model of many layers that is
7 % of a token at the median, and a fifth at best. A program is one call:
`layercomb_kernels.run_program` goes through its phases. Instructions of a phase need nothing of
each other, or go row by row.

Shape letters: B batch, T new positions, M = B·T rows, D width, H heads, K head depth.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import layercomb_kernels
from layercomb.layers.decoding.narrow import Kept, Rounded
from layercomb.layers.decoding.seek import Position
from layercomb.layers.quantized.matrix import Narrow

# The numbers of `Op` and `Activation` in program.h.
_OPS = (
    *('normalize', 'activate', 'add', 'multiply', 'product', 'turn', 'append', 'attend'),
    *('join', 'factors', 'convolve', 'choose', 'route'),
)
_PARTS = 16  # kParts in products.h
ACTIVATIONS = 'relu', 'relu2', 'gelu', 'silu', 'tanh', 'sigmoid'


class Unfit(Exception):
    """A layer, or its weights, cannot be part of a program."""


def need(fits: bool, why: str) -> None:
    """Raises `Unfit` unless something holds.

    Args:
      fits: what must hold.
      why: what is wrong if it does not.
    """
    if not fits:
        raise Unfit(why)


@dataclasses.dataclass(frozen=True)
class Value:
    """What an instruction makes, float32.

    Attributes:
      number: of the value in its program.
      shape: as layers see it, (B, T, D) or (B, H, T, K); in memory it is (M, D) or (M, H·K).
      width: D, or H·K.
    """

    number: int
    shape: tuple[int, ...] = dataclasses.field(compare=False)
    width: int
    dtype: Any = dataclasses.field(default=np.dtype(np.float32), compare=False)
    ndim = property(lambda self: len(self.shape))


@dataclasses.dataclass(frozen=True)
class Written:
    """What stands for an operand that the call writes in place, until it is made.

    Attributes:
      number: of the operand.
    """

    number: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """Words for the kernels, in which a `Value` is one, and a `Written` the number of a result.

    Attributes:
      words: with the number of the operation in front.
      reads, writes: whatever must not be read before it is written.
      by_row: whether it goes row by row.
    """

    words: tuple[Any, ...]
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    by_row: bool = True


class Program:
    """Instructions, as rules of layers write them, from inputs to outputs.

    Attributes:
      batch: B.
      length: T.
      inputs: the values, each (B, T, D), that it begins with.
    """

    def __init__(self, *shapes: tuple[int, ...]):
        """Begins a program for inputs of shapes (B, T, D), which may differ in D."""
        self.batch, self.length, _ = shapes[0]
        self._values: list[Value] = []
        self._instructions: list[_Instruction] = []
        self._operands: list[jax.Array] = []
        self._numbers: dict[int, int] = {}  # of operands, by identity
        self._written: list[int] = []
        self._factors: list[float] = []
        self._n_products = self._n_convolutions = self._n_choices = self._n_mixtures = 0
        need(len({shape[:2] for shape in shapes}) == 1, 'inputs of several lengths')
        self.inputs = tuple(self._value(shape, shape[-1]) for shape in shapes)

    def _value(self, shape: Sequence[int], width: int) -> Value:
        value = Value(len(self._values), tuple(shape), width)
        self._values.append(value)
        return value

    def like(self, x: Value) -> Value:
        """A new value of the shape of another."""
        return self._value(x.shape, x.width)

    def operand(self, array: Any) -> int:
        """The number of an array among the operands."""
        if id(array) not in self._numbers:
            self._numbers[id(array)] = len(self._operands)
            self._operands.append(array)  # which keeps it, and so its id
        return self._numbers[id(array)]

    def written(self, array: Any) -> Written:
        """An array, as what it will be when the call has written it in place."""
        number = self.operand(array)
        if number not in self._written:
            self._written.append(number)
        return Written(number)

    def _check_taken(self, taken: Any) -> None:
        fits = taken.shape == (self.batch,) and taken.dtype == jnp.int32
        need(fits, 'positions of another shape or dtype')

    def moved(self, position: Position) -> Position:
        """A position after T more, of which the call takes care."""
        self._check_taken(position.rows)
        return Position(self.written(position.rows))  # type: ignore[arg-type]

    def _factor(self, value: float) -> int:
        self._factors.append(float(value))
        return len(self._factors) - 1

    def _emit(
        self,
        name: str,
        words: Iterable[Any],
        reads: Iterable[Any],
        writes: Iterable[Any],
        by_row: bool = True,
    ) -> None:
        instruction = _OPS.index(name), *words
        self._instructions.append(_Instruction(instruction, tuple(reads), tuple(writes), by_row))

    def normalize(self, x: Value, scale: Any, bias: Any, epsilon: float) -> Value:
        """Each K or D features, normalized: with a bias as `LayerNorm`, without as `RMSNorm`.

        Args:
          x: (B, T, D) or (B, H, T, K).
          scale: (D,) or (K,) float32.
          bias: likewise, or None.
          epsilon: added to the mean square.
        """
        for weight in (scale, bias):
            if weight is not None:
                need(_is(weight, (x.shape[-1],)), 'a norm of another width')
        y, at = self.like(x), self.operand(scale)
        words = x, y, at, at if bias is None else self.operand(bias), bias is not None
        self._emit('normalize', (*words, self._factor(epsilon)), (x,), (y,))
        return y

    def activate(self, x: Value, kind: str) -> Value:
        """An elementwise function, one of `ACTIVATIONS`."""
        need(kind in ACTIVATIONS, f'there is no native {kind}')
        y = self.like(x)
        self._emit('activate', (x, y, ACTIVATIONS.index(kind)), (x,), (y,))
        return y

    def combine(self, how: str, a: Value, b: Value) -> Value:
        """a + b for 'add', a · b for 'multiply'."""
        need(a.shape == b.shape, 'values of two shapes')
        y = self.like(a)
        self._emit(how, (a, b, y), (a, b), (y,))
        return y

    def product(self, x: Value, kernel: Any, bias: Any, shape: Sequence[int]) -> Value:
        """x times a matrix, plus a bias.

        Args:
          x: of width D.
          kernel: a `Narrow`, or a float32 array (*D, *F).
          bias: float32 (F,), or (H, K); or None.
          shape: of the result, whose width is F.
        """
        width = math.prod(shape) // (self.batch * self.length)
        words, scales, options = _matrix(kernel, x.width, width)
        features = (shape[1], shape[3]) if len(shape) == 4 else (shape[-1],)
        need(bias is None or _is(bias, features), 'a bias of another shape')
        y = self._value(shape, width)
        n, at = self._n_products, self.operand(words)
        self._n_products += 1
        first, last = (at if a is None else self.operand(a) for a in (scales, bias))
        # Where each output is a sum of parts, these have a place of their own.
        parts = self._value(shape, _PARTS * width) if words.dtype == jnp.float32 else y
        prepared = 'prepared', n
        self._emit('product', (0, n, x, y, parts, at, first, *options), (x,), (prepared,))
        # Floats are prepared by leaving them where they are, so x is read here, too.
        self._emit('product', (1, n), (x, prepared), (y, parts), by_row=False)
        self._emit('product', (2, n, y, last, bias is not None), (y, parts), (y,))
        return y

    def turn(
        self, q: Value, k: Value, taken: Any, speeds: Any, max_len: int | None, in_pairs: bool,
        magnitude: float,
    ) -> tuple[Value, Value]:  # fmt: skip
        """Rotary positions of queries and keys.

        Args:
          q, k: (B, H, T, K); heads may differ in number.
          taken: (B,) int32, the positions taken.
          speeds: (n / 2,) float32, radians a position.
          max_len: positions from there on are NaN; None for no limit.
          in_pairs: whether features 2i and 2i + 1 make a pair; else i and i + n / 2.
          magnitude: what the turned features are multiplied by.
        """
        self._check_taken(taken)
        known = speeds.ndim == 1 and speeds.dtype == jnp.float32
        need(known and 2 * speeds.size <= q.shape[-1], 'frequencies of another kind')
        to_q, to_k = self.like(q), self.like(k)
        numbers = self.operand(taken), self.operand(speeds), q.shape[-1], max_len or 0, in_pairs
        words = q, to_q, k, to_k, *numbers, self._factor(magnitude)
        self._emit('turn', words, (q, k), (to_q, to_k))
        return to_q, to_k

    def append(self, x: Value, cache: Kept, taken: Any) -> Kept:
        """Writes the new positions of x (B, H, T, K) into a cache (B·H, L, K).

        Args:
          x: keys or values.
          cache: float32, bfloat16 or `Rounded`.
          taken: (B,) int32, the positions taken.

        Returns:
          The cache with `Written` in the place of arrays.
        """
        self._check_taken(taken)
        n_heads, _, depth = x.shape[1:]
        fits = cache.shape == (self.batch * n_heads, cache.shape[1], depth)
        need(fits and _is_cache(cache), 'a cache of another kind')
        arrays = jax.tree.leaves(cache)
        need(all(self.operand(x) not in self._written for x in arrays), 'one cache for two kinds')
        to = jax.tree.map(self.written, cache)
        numbers = self.operand(taken), cache.shape[1]
        self._emit('append', (x, *_words_and_scales(to), *numbers), (x,), jax.tree.leaves(to))
        return to

    def attend(
        self, q: Value, caches: tuple[Kept, Kept], taken: Any, window: int | None,
        scale: float, softcap: float | None,
    ) -> Value:  # fmt: skip
        """Attention of the new positions to a cache that holds them.

        Args:
          q: (B, H, T, K).
          caches: of keys (B·G, L, K) and values (B·G, L, V), as `append` returns them.
          taken: (B,) int32, the positions taken before.
          window: how many positions one sees; None for all.
          scale: of the scores.
          softcap: of the scores after that; None for none.

        Returns:
          (B, H, T, V).
        """
        self._check_taken(taken)
        keys, values = (self._operands[_words_and_scales(each)[0].number] for each in caches)
        n_heads, group = q.shape[1], self.batch * q.shape[1] // len(keys)
        need(keys.shape[-1] == q.shape[-1] and group * len(keys) == self.batch * n_heads, 'heads')
        need(keys.shape[:2] == values.shape[:2], 'keys and values of two lengths')
        need(keys.dtype == values.dtype, 'keys and values of two kinds')
        depth = values.shape[-1]
        y = self._value((*q.shape[:3], depth), n_heads * depth)
        numbers = self.operand(taken), n_heads, group, keys.shape[1], window or 0
        factors = self._factor(scale), self._factor(softcap or 0)
        places = itertools.chain.from_iterable(map(_words_and_scales, caches))
        reads = q, *jax.tree.leaves(caches)
        self._emit('attend', (q, y, *places, *numbers, *factors), reads, (y,), by_row=False)
        return y

    def run(
        self, inputs: Sequence[jax.Array], outputs: Sequence[Value]
    ) -> tuple[tuple[jax.Array, ...], dict[Written, jax.Array]]:
        """Calls the program.

        Args:
          inputs: each (B, T, D) float32.
          outputs: the values that are wanted; an input among them is returned as it is.

        Returns:
          The outputs, in their shapes (B, T, F), and what has been written.
        """
        made = list(dict.fromkeys(y for y in outputs if y not in self.inputs))
        need(bool(made), 'a program without instructions')
        rows = [x.reshape(self.batch * self.length, x.shape[-1]) for x in inputs]  # → (M, D)
        code = [self.length, len(inputs), len(made), *self._code(made)]
        results = layercomb_kernels.run_program(
            np.asarray(code, np.int32),
            np.asarray(self._factors or [0], np.float32),
            rows,
            [y.width for y in made],
            self._operands,
            self._written,
        )
        arrays = dict(zip((*self.inputs, *made), (*rows, *results), strict=False))
        written = zip(self._written, results[len(made) :], strict=True)
        put = tuple(self._in_shape(arrays[y], y.shape) for y in outputs)
        return put, {Written(number): array for number, array in written}

    def _in_shape(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Rows (M, F) in the shape of their value."""
        if len(shape) == 3:
            return y.reshape(shape)
        batch, n_heads, length, depth = shape
        return y.reshape(batch, length, n_heads, depth).swapaxes(1, 2)  # (M, H·K) → (B, H, T, K)

    def _code(self, outputs: Sequence[Value]) -> list[int]:
        """The words that `RunProgram` reads."""
        phases = self._phases()
        begins, size = self._begins(phases, outputs)
        results = {number: i for i, number in enumerate(self._written)}

        def encoded(word: Any) -> Iterable[int]:
            if isinstance(word, Value):
                return word.number, word.width
            return (results[word.number],) if isinstance(word, Written) else (int(word),)

        code = [size, len(begins), *begins, len(phases)]
        for phase in phases:
            code += [int(phase[0].by_row), len(phase)]
            code += itertools.chain.from_iterable(
                encoded(word) for instruction in phase for word in instruction.words
            )
        return code

    def _phases(self) -> list[list[_Instruction]]:
        """The instructions, each in the first phase that it can be in.

        Even phases go row by row. There an instruction may read what one before it, in the same
        phase, has written.
        """
        phases: dict[int, list[_Instruction]] = {}
        ready: dict[Hashable, int] = dict.fromkeys(self.inputs, 0)  # when something is written
        for each in self._instructions:
            at = max(ready[token] for token in each.reads)
            odd = at % 2
            at += odd if each.by_row else 2 * odd or 1
            phases.setdefault(at, []).append(each)
            ready |= dict.fromkeys(each.writes, at)
        return [phases[at] for at in sorted(phases)]

    def _begins(self, phases: Any, outputs: Sequence[Value]) -> tuple[list[int], int]:
        """Where each value begins in the workspace, as `RunProgram` reads it, and its size.

        Places are taken again in the phase after the one in which a value is read for the last
        time: rows of a phase are at different instructions.
        """
        last = {each: p for p, phase in enumerate(phases) for i in phase for each in i.reads}
        begins = [0] * len(self._values)
        given = *self.inputs, *outputs
        for i, value in enumerate(given):
            begins[value.number] = -1 - i
        placed = set(given)
        taken: list[tuple[int, int, int]] = []  # begin, end, and the last phase
        size = 0
        for p, phase in enumerate(phases):
            taken = [place for place in taken if place[2] >= p]
            for value in _values_made(phase):
                if value in placed:
                    continue
                placed.add(value)
                width = -(-value.width // 16) * 16  # whole lines of a cache
                at = 0
                for begin, end, _ in sorted(taken):
                    if begin - at >= width:
                        break
                    at = max(at, end)
                begins[value.number] = at
                taken.append((at, at + width, last.get(value, p)))
                size = max(size, at + width)
        return begins, size


def _values_made(phase: Sequence[_Instruction]) -> list[Value]:
    return [token for each in phase for token in each.writes if isinstance(token, Value)]


def _is(array: Any, shape: tuple[int, ...]) -> bool:
    """Whether something is a float32 array of a shape."""
    shaped = isinstance(array, jax.Array | np.ndarray) and array.shape == shape
    return shaped and bool(array.dtype == jnp.float32)


def _is_cache(cache: Kept) -> bool:
    """Whether the kernels can write to a cache."""
    if isinstance(cache, Rounded):
        return cache.scales.shape == (*cache.shape[:-1], 1)
    return bool(cache.dtype in (jnp.float32, jnp.bfloat16))


def _words_and_scales(written: Kept) -> tuple[Written, Written]:
    """Where a cache and its scales are; where it has none, these are itself."""
    places = jax.tree.leaves(written)
    return places[0], places[-1]


def _matrix(kernel: Any, d: int, f: int) -> tuple[Any, Any, tuple[int, bool]]:
    """Words, scales or None, and how many bytes of activations count, and whether minima are there.

    Args:
      kernel: a `Narrow`, or a float32 array.
      d, f: of which (D, F) it must be.
    """
    if not isinstance(kernel, Narrow):
        need(isinstance(kernel, jax.Array | np.ndarray), 'a matrix of another kind')
        need(kernel.dtype == jnp.float32 and kernel.size == d * f > 0, 'a matrix of another size')
        need(math.prod(kernel.shape[:-1]) == d or kernel.shape[0] == d, 'a matrix of another size')
        return kernel.reshape(d, f), None, (2, False)
    need(kernel.axes != 'oi' and math.prod(kernel.shape) == d * f > 0, 'a matrix of another size')
    rows = kernel.as_rows()
    need(rows.values.shape[0] == f, 'a matrix of another size')
    if kernel.in_panels:
        layercomb_kernels.check_panels(rows.values, rows.scales, d, kernel.minima)
    else:
        halves = rows.scales is not None and rows.scales.dtype != jnp.float32
        need(not kernel.minima and not halves, 'rows with minima or short scales')
        need(rows.values.dtype in (jnp.bfloat16, jnp.int8, jnp.uint8), 'rows of another kind')
    return rows.values, rows.scales, (kernel.activation_bits // 8, kernel.minima)
