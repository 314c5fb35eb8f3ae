"""C++ kernels for a CPU: products of a few rows of activations, for decoding, and attention.

XLA is slow there. It widens int8, int4 and bfloat16 weights again for every product, which at one
position takes ten times as long as the product itself; it gathers rows before it multiplies them;
and it copies the factors of sparse layers to another layout. These kernels read each weight once
per position. Small operations such as a norm are included, since XLA makes about six loops of one,
each of which costs a few microseconds. And it computes attention of many queries on one thread;
`flash_forward`, `flash_backward` and those of `selected` attention take all, and are for training,
too. To choose blocks it sorts all products; `best_blocks` sorts the best alone.

The kernels are compiled at first use with the machine's own compiler; without one, those are taken
that a wheel may bring (`packaged`). Where there are none, or with ``LAYERCOMB_KERNELS=0``,
`available` is false and the library uses XLA. ``python -m layercomb_kernels`` compiles them ahead
and reports whether they work, and which they are.

Weights are float32, bfloat16, int8, or two int4 in a byte (uint8): in a row of n bytes, byte j
holds column j in its low half and column j + n in its high half. Scales are float32, one for each
group of integers along a row; float weights have none, (0, 0). Integers may be in
panels, too: see `panel_products`. Products by panels round activations to 16 bits, with a scale for
every few values, as do those by other integers on processors with an integer dot product. Products
of many rows by bfloat16 keep 16 bits of each, too, on processors with dot products of bfloat16. The
typical relative error of a product is then 3e-5; rounding weights to int8 costs 4e-3, to bfloat16
2e-3.

Letters: M rows of activations, D their width, F outputs, K gathered rows, G groups, S modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layercomb_kernels import build, library

_NAMES = (
    'row_products',
    'panel_products',
    'run_program',
    'table_rows',
    'gathered_products',
    'gathered_sums',
    'factored_products',
    'module_convolution',
    'chosen_units',
    'normalize',
    'query_attention',
    'gathered_cosines',
    'gathered_means',
    'nearest_rotations',
    'placed_attention',
    'flash_forward',
    'flash_backward',
    'best_blocks',
    'selected_forward',
    'selected_backward',
)
DEPTH = 16  # the depths that `flash_forward` takes are multiples of it
DEPTHS = (16, 32, 64, 128)  # those that `selected_forward` takes
_WORDS = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint8)
_OPERANDS = (*_WORDS, jnp.float16, jnp.int32, jnp.uint32)

_off = jax.make_user_context(False)


def available() -> bool:
    """Whether the kernels can be used here; the first call compiles them."""
    return why_not() is None


def why_not() -> str | None:
    """Why the kernels cannot be used, in one line; None if they can. It compiles them if needed."""
    return 'switched off by layercomb_kernels.off()' if _off.value else _register()


def are_off() -> bool:
    """Whether this is inside `off`."""
    return _off.value


@contextlib.contextmanager
def off() -> Iterator[None]:
    """A context without kernels, for programs that leave this process, such as exported ones.

    Programs traced inside and outside are kept apart.
    """
    with _off(True):
        yield


@functools.cache
def _register() -> str | None:
    _check_threads()
    try:
        handlers = library.load().handlers
        for name in _NAMES:
            handler = jax.ffi.pycapsule(getattr(handlers, f'layercomb_{name}'))
            jax.ffi.register_ffi_target(f'layercomb_{name}', handler, platform='cpu')
    except build.Unavailable as e:
        return str(e)
    except jax.errors.JaxRuntimeError as e:  # a version of the interface that it has given up
        return f'jaxlib refuses them: {str(e).strip().splitlines()[0]}'
    return None


def _check_threads() -> None:
    """Raises a ValueError if the environment gives no number of threads."""
    given = os.environ.get('LAYERCOMB_THREADS')
    if given is not None and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise ValueError(
            f'LAYERCOMB_THREADS={given!r} is no number of threads: give 1 or more, or leave it out '
            'for as many as there are CPUs'
        )


def row_products(x: jax.Array, words: jax.Array, scales: jax.Array, n_bytes: int = 2) -> jax.Array:
    """y[m, f] = Σ_d x[m, d] W[f, d].

    Args:
      x: (M, D) float32.
      words: W (F, D), or (F, D / 2) uint8 of two int4 each.
      scales: (F, G) float32, for groups of D / G weights in a row, for int4 each within one half of
        it; (0, 0) for float weights.
      n_bytes: of each activation that count where more than 16 rows are multiplied by bfloat16, on
        processors with dot products of bfloat16: 2, for an error of 2e-5, or 1, for 2e-3, which is
        half as fast again. For 2 to 16 rows 2 count there, with an error of 4e-6. Elsewhere float
        weights are multiplied by float32.

    Returns:
      (M, F) float32.
    """
    _check_ranks(x=(x, 2), words=(words, 2), scales=(scales, 2))
    _check(x.shape[1] == _columns(words), x, words)
    _check_matrix(words, scales, x)
    options = _bytes_of_x(n_bytes)
    return _call('row_products', (x.shape[0], words.shape[0]), x, words, scales, options)


def panel_products(
    x: jax.Array, words: jax.Array, scales: jax.Array, n_bytes: int = 2, minima: bool = False
) -> jax.Array:
    """y[m, f] = Σ_d x[m, d] W[f, d], for any number of rows; nothing is widened.

    Args:
      x: (M, D) float32.
      words: W in panels, (F, D / 4) uint32 of four int8 each, or (F, D / 8) of eight int4. Sixteen
        rows are interleaved: in memory, word c of row r of a panel is at 16c + r. The last F mod 16
        rows are as they are. Byte k of a word of int8 is column k plus 128; of int4 its low half is
        column k plus 8, and its high half column k + 4 plus 8.
      scales: (F, G) float32 or float16, for groups of D / G weights, interleaved alike; with minima
        (F, 2G).
      n_bytes: of each activation that count: 2, for an error of 3e-5, or 1, for 5e-3, which makes
        products of many rows up to twice as fast on processors with dot products of bytes.
      minima: whether the second half of the scales are minima. A weight is then
        scale · u + minimum, with the integer u as it is stored, from 0; else scale · (u − 128), or
        for int4 scale · (u − 8).

    Returns:
      (M, F) float32.
    """
    _check_ranks(x=(x, 2))
    _check_dtypes(x, x)
    check_panels(words, scales, x.shape[1], minima)
    options = _bytes_of_x(n_bytes, minima)
    return _call('panel_products', (len(x), len(words)), x, words, scales, options)


def check_panels(words: Any, scales: Any, d: int, minima: bool = False) -> None:
    """Checks a matrix in panels, as of `panel_products`.

    Args:
      words, scales: of the matrix.
      d: how many columns it must have.
      minima: whether half of the scales are minima.

    Raises:
      ValueError: if shapes do not fit together.
      TypeError: if dtypes are others.
    """
    _check_ranks(words=(words, 2), scales=(scales, 2))
    if scales.dtype not in (jnp.float32, jnp.float16):
        raise TypeError(f'scales of panels are float32 or float16, got {scales.dtype}')
    if words.dtype != jnp.uint32:
        raise TypeError(f'weights in panels are uint32, got {words.dtype}')
    (f, c), n_groups = words.shape, scales.shape[1] // (1 + minima)
    line = d // max(c, 1)  # columns of a word
    fits = line in (4, 8) and d == c * line and n_groups > 0
    fits = fits and scales.shape == (f, n_groups * (1 + minima))
    _check(fits and d % (n_groups * line) == 0, words, scales)


def run_program(
    code: Any,
    factors: Any,
    inputs: Sequence[jax.Array],
    widths: Sequence[int],
    operands: Sequence[jax.Array],
    written: Sequence[int],
) -> list[jax.Array]:
    """Layers of a decoding step, as instructions that `transforms.fuse` writes.

    Whoever writes instructions must check the shapes of what they name: the kernels do not.

    Args:
      code: int32, the numbers of new positions of a row, of inputs and of outputs, and the
        instructions: see program.h.
      factors: float32, numbers that they ask for.
      inputs: each (M, D) float32, new positions of rows of a batch, one row after the other.
      widths: F of each output.
      operands: weights, positions taken (B,) int32, and caches (N, L, K), float32, bfloat16, or
        int8 with scales (N, L, 1) float32.
      written: numbers of the operands that are written in place: caches get the new keys, values
        or inputs, and positions move on.

    Returns:
      Outputs (M, F) float32, and the operands that have been written, in their order.
    """
    _check_registered()
    for x in inputs:
        _check_ranks(x=(x, 2))
        _check_dtypes(x, x)
        _check(len(x) == len(inputs[0]), x, inputs[0])
    for operand in operands:
        if operand.dtype not in _OPERANDS:
            raise TypeError(f'the kernels take no operand of dtype {operand.dtype}')
    results = [
        *(jax.ShapeDtypeStruct((len(inputs[0]), width), jnp.float32) for width in widths),
        *(jax.ShapeDtypeStruct(operands[n].shape, operands[n].dtype) for n in written),
    ]
    n_inputs, n_outputs = len(inputs), len(widths)
    in_place = {2 + n_inputs + n: n_outputs + i for i, n in enumerate(written)}
    call = jax.ffi.ffi_call(
        'layercomb_run_program',
        results,
        input_output_aliases=in_place,
        vmap_method='sequential',
    )

    @jax.custom_jvp
    def run(*args: Any) -> Any:
        return tuple(call(*args))

    @run.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise ValueError(
            'a fused decoding step has no derivative: take that of the model which transforms.fuse '
            'was given, or of Mode.EVAL'
        )

    return list(run(code, factors, *inputs, *operands))


def table_rows(table: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of a table, y[m] = table[at[m]], or the nearest row where there is none.

    XLA would widen the whole of a bfloat16 table on a CPU, to look up a few rows.

    Args:
      table: (F, D), of any dtype, and not empty.
      at: (M,) int32.

    Returns:
      (M, D), in the dtype of the table.
    """
    _check_ranks(table=(table, 2), at=(at, 1))
    _check(table.size > 0, table)
    if at.dtype != jnp.int32:
        raise TypeError(f'expected int32, got {at.dtype}')
    return _call('table_rows', (len(at), table.shape[1]), table, at, dtype=table.dtype)


def gathered_products(
    x: jax.Array, at: jax.Array, words: jax.Array, scales: jax.Array
) -> jax.Array:
    """y[m, k] = Σ_d x[m, d] W[at[m, k], d]; no other rows of W are read.

    Args:
      x: (M, D) float32.
      at: (M, K) int32; an index out of bounds is clamped.
      words, scales: as of `row_products`.

    Returns:
      (M, K) float32.
    """
    _check_ranks(x=(x, 2), at=(at, 2), words=(words, 2), scales=(scales, 2))
    _check(x.shape[1] == _columns(words) and len(x) == len(at), x, at, words)
    _check_matrix(words, scales, x)
    return _call('gathered_products', at.shape, x, at.astype(jnp.int32), words, scales)


def gathered_sums(h: jax.Array, at: jax.Array, words: jax.Array, scales: jax.Array) -> jax.Array:
    """y[m, d] = Σ_k h[m, k] W[at[m, k], d]; no other rows of W are read.

    Args:
      h: (M, K) float32.
      at, words, scales: as of `gathered_products`.

    Returns:
      (M, D) float32.
    """
    _check_ranks(h=(h, 2), at=(at, 2), words=(words, 2), scales=(scales, 2))
    _check(h.shape == at.shape, h, at, words)
    _check_matrix(words, scales, h)
    shape = (h.shape[0], _columns(words))
    return _call('gathered_sums', shape, h, at.astype(jnp.int32), words, scales)


def factored_products(
    x: jax.Array, modules: jax.Array, words: jax.Array, scales: jax.Array
) -> jax.Array:
    """y[m, s, f] = Σ_d x[m, d] A[s, d] W[f, d].

    Args:
      x: (M, D) float32.
      modules: A (S, D) float32.
      words, scales: as of `row_products`.

    Returns:
      (M, S, F) float32.
    """
    _check_ranks(x=(x, 2), modules=(modules, 2), words=(words, 2), scales=(scales, 2))
    _check(x.shape[1] == modules.shape[1] == _columns(words), x, modules, words)
    _check_matrix(words, scales, x)
    _check_dtypes(words, modules)
    shape = (x.shape[0], modules.shape[0], words.shape[0])
    return _call('factored_products', shape, x, modules, words, scales)


def module_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """y[m, s] = Σ_p Σ_j x[m, p, s + j] W[p, j], over P positions and windows of J modules.

    Args:
      x: (M, P, S + J − 1, D) float32.
      kernel: W (P, J, D, F) float32.

    Returns:
      (M, S, F) float32.
    """
    _check_ranks(x=(x, 4), kernel=(kernel, 4))
    n_s = x.shape[2] - kernel.shape[1] + 1
    _check(x.shape[1::2] == kernel.shape[:3:2] and n_s > 0, x, kernel)
    _check_dtypes(kernel, x, kernel)
    return _call('module_convolution', (x.shape[0], n_s, kernel.shape[3]), x, kernel)


def chosen_units(x: jax.Array, first: jax.Array, second: jax.Array, block_size: int) -> jax.Array:
    """The number of the largest logit in each block of N, for the logits x A B.

    Of equal logits the first is chosen; in a block with NaN, the last unit.

    Args:
      x: (M, D) float32.
      first: A (D, R) float32.
      second: B (R, F) float32.
      block_size: N, which divides F.

    Returns:
      (M, F / N) int32, numbers from 0 to F − 1.
    """
    _check_ranks(x=(x, 2), first=(first, 2), second=(second, 2))
    n = second.shape[1]
    fits = (x.shape[1], len(second)) == first.shape and n % block_size == 0
    _check(fits, x, first, second)
    _check_dtypes(second, x, first, second)
    return _call('chosen_units', (len(x), n // block_size), x, first, second, dtype=jnp.int32)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x − mean) / √(variance + epsilon) · scale + bias, along rows.

    Args:
      x: (M, D) float32.
      scale, bias: (D,) float32.
      epsilon: added under the root.

    Returns:
      (M, D) float32.
    """
    return _normalize(x, scale, epsilon, bias)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / √(mean of x² + epsilon) · scale, along rows.

    Args:
      x: (M, D) float32.
      scale: (D,) float32.
      epsilon: added under the root.

    Returns:
      (M, D) float32.
    """
    return _normalize(x, scale, epsilon)


def _normalize(x: jax.Array, scale: jax.Array, epsilon: float, *bias: jax.Array) -> jax.Array:
    _check_ranks(x=(x, 2))
    _check(all(w.shape == x.shape[1:] for w in (scale, *bias)), x, scale, *bias)
    _check_dtypes(scale, x, scale, *bias)
    return _call('normalize', x.shape, x, scale, jnp.asarray(epsilon, jnp.float32), *bias)


def query_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    softcap: float | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """y[n] = Σ_c softmax(query[n] · keys[g, c]) values[g, c], over the seen c; 0 if none is seen.

    The N/G queries of neighbouring heads share keys and values: g = ⌊n·G/N⌋. Keys and values after
    the last seen key are not read. Values before it are read, and must be finite. Rows and heads
    share one axis, as in a cache, which XLA would copy if it were reshaped. Narrow keys and values
    are widened as they are read.

    Args:
      query: (N, K) float32, for N = M rows · heads.
      keys: (G, C, K) float32, bfloat16 or int8, for G = M rows · heads of keys; G divides N.
      values: (G, C, V), in the dtype of the keys.
      seen: (M, C) bool, the same for all heads of a row.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
      scales: of keys and of values, (G, C, 1) float32 each, if they are int8; else None.

    Returns:
      (N, V) float32.

    Raises:
      ValueError: if the shapes do not fit together.
      TypeError: for other dtypes, for int8 without scales, and for scales of anything else.
    """
    args = query, keys, values, seen
    _check_ranks(query=(query, 2), keys=(keys, 3), values=(values, 3), seen=(seen, 2))
    (n, k), (m, c), g = query.shape, seen.shape, len(keys)
    whole = n == g * (n // max(g, 1)) and g == m * (g // max(m, 1))
    _check(whole and keys.shape[1:] == (c, k) and values.shape[:2] == (g, c), *args)
    more: tuple[jax.Array, ...] = scales or ()
    _check_dtypes(query, query, *more)
    _check_cached(keys, values, bool(more))
    _check(all(x.shape == (g, c, 1) for x in more), keys, *more)
    if seen.dtype != jnp.bool_:
        raise TypeError(f'seen must be bool, got {seen.dtype}')
    cap = jnp.asarray(softcap or 0, jnp.float32)
    return _call('query_attention', (n, values.shape[2]), *args, cap, *more)


def _check_cached(keys: jax.Array, values: jax.Array, scaled: bool) -> None:
    """Checks the dtypes of keys and values of a cache."""
    given = f'got keys {keys.dtype} and values {values.dtype}'
    if keys.dtype != values.dtype or keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        raise TypeError(f'keys and values are both float32, bfloat16 or int8, {given}')
    if scaled != (keys.dtype == jnp.int8):
        raise TypeError(f'int8 has scales, and nothing else has, {given}')


def gathered_cosines(
    x: jax.Array, at: jax.Array, keys: jax.Array, epsilon: float | jax.Array
) -> jax.Array:
    """y[n, k] = x[n] · w / √(w · w + epsilon), where w = keys[⌊n·M/N⌋, at[n, k]].

    No other keys are read.

    Args:
      x: (N, D) float32.
      at: (N, K) int32; an index out of bounds is clamped.
      keys: (M, L, D) float32; M divides N.
      epsilon: added under the root.

    Returns:
      (N, K) float32.
    """
    _check_ranks(x=(x, 2), at=(at, 2), keys=(keys, 3))
    (m, length, d), n = keys.shape, len(at)
    _check(x.shape == (n, d) and n == m * (n // max(m, 1)) and length > 0, x, at, keys)
    _check_dtypes(keys, x, keys)
    at = at.astype(jnp.int32)
    return _call('gathered_cosines', at.shape, x, at, keys, jnp.asarray(epsilon, jnp.float32))


def gathered_means(p: jax.Array, at: jax.Array, values: jax.Array) -> jax.Array:
    """y[n] = Σ_k p[n, k] values[⌊n·M/N⌋, at[n, k]]; no other values are read.

    Args:
      p: (N, K) float32.
      at: (N, K) int32; an index out of bounds is clamped.
      values: (M, L, D) float32; M divides N.

    Returns:
      (N, D) float32.
    """
    _check_ranks(p=(p, 2), at=(at, 2), values=(values, 3))
    (m, length, d), n = values.shape, len(at)
    _check(p.shape == at.shape and n == m * (n // max(m, 1)) and length > 0, p, at, values)
    _check_dtypes(values, p, values)
    return _call('gathered_means', (n, d), p, at.astype(jnp.int32), values)


def nearest_rotations(factors: tuple[int, ...], x: jax.Array, rotations: jax.Array) -> jax.Array:
    """The bucket of each vector in each round: the rotation, or its negative, that is nearest.

    Args:
      factors: of the number of buckets, each 1 or even; a later one counts faster.
      x: (M, H, K) float32.
      rotations: (H, R, F, K) float32, for F half the sum of the factors that are not 1.

    Returns:
      (M, H, R) int32, from 0 to the product of the factors − 1.

    Raises:
      ValueError: if the shapes do not fit together.
      TypeError: for other dtypes.
    """
    _check_ranks(x=(x, 3), rotations=(rotations, 4))
    (h, rounds, width, _), halves = rotations.shape, [f // 2 for f in factors if f != 1]
    fits = x.shape[1:] == (h, rotations.shape[3]) and sum(halves) == width
    _check(fits and all(n > 0 for n in halves), x, rotations)
    _check_dtypes(rotations, x, rotations)
    args = x, rotations, jnp.asarray(factors, jnp.int32)
    return _call('nearest_rotations', (len(x), h, rounds), *args, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a query of `placed_attention` sees beside what it has found, and how scores are made.

    Attributes:
      local_len, n_sinks: how many of the last real keys it sees, and how many of the first.
      once: whether a key that is found several times counts once.
      scale: factor of the scores.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
    """

    local_len: int
    n_sinks: int
    once: bool
    scale: float
    softcap: float | None = None


def placed_attention(
    reading: Reading,
    q: jax.Array,
    found: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    at: jax.Array,
    n_real: jax.Array,
    real: jax.Array,
) -> jax.Array:
    """Softmax attention of one query a head to keys of a cache, of which no others are read.

    Args:
      reading: the static part.
      q: (N, K) float32, for N = B rows · heads.
      found: (N, J) int32, positions; negative where there is none.
      keys: (M, L, K) float32; M divides N, and neighbouring heads share keys and values.
      values: (M, L, D) float32.
      at: (B, L) int32, the position of each real key in turn.
      n_real: (B,) int32, how many real keys there are.
      real: (B,) bool, which rows have a query.

    Returns:
      (N, D) float32; zero where a query sees no key, or a row has none.

    Raises:
      ValueError: if the shapes do not fit together, or a size is negative.
      TypeError: for other dtypes.
    """
    args = q, found, keys, values, at, n_real, real
    _check_ranks(q=(q, 2), found=(found, 2), keys=(keys, 3), values=(values, 3), at=(at, 2))
    (n, d), (m, length, _), b = q.shape, keys.shape, len(at)
    whole = m > 0 and n % m == 0 and b > 0 and m % b == 0 and length > 0
    fits = keys.shape == (m, length, d) and values.shape[:2] == (m, length) and len(found) == n
    _check(whole and fits and at.shape == (b, length), *args)
    _check(n_real.shape == real.shape == (b,), *args)
    _check_dtypes(keys, q, keys, values)
    for x, dtype in ((found, jnp.int32), (at, jnp.int32), (n_real, jnp.int32), (real, jnp.bool_)):
        if x.dtype != dtype:
            raise TypeError(f'expected {jnp.dtype(dtype).name}, got {x.dtype}')
    factors = jnp.asarray([reading.scale, reading.softcap or 0], jnp.float32)
    sizes = _sizes(length, local_len=reading.local_len, n_sinks=reading.n_sinks)
    limits = jnp.asarray([*sizes, reading.once], jnp.int32)
    return _call('placed_attention', (n, values.shape[2]), *args, factors, limits)


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which keys a query of `flash_forward` sees, and how its scores are made.

    Attributes:
      scale: factor of the scores.
      causal: whether a query sees only keys at its own position and before.
      window: how many keys a causal query sees at most, its own included; None for all.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None


def flash_forward(
    sight: Sight,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    offset: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of many queries, whose scores never exist whole.

    Depths are multiples of `DEPTH`. The result does not depend on the number of threads, and that
    of a query not on other queries.

    Args:
      sight: the static part.
      q: (B, H, Lq, K) float32.
      k: (B, G, Lk, K) float32; G divides H, and neighbouring heads share keys and values.
      v: (B, G, Lk, D) float32.
      mask: (B, Lk) bool, True = a real key; or None.
      offset: (B,) int32, positions of the first queries; None for zero.
      segments: (B, L) int32, for Lq = Lk = L: positions of different numbers do not see each other;
        None for no segments. Tiles without a common number cost nothing.

    Returns:
      The output (B, H, Lq, D), zero where a query sees no key; and the logsumexp of its scores
      (B, H, Lq), 1e30 there. Both are float32.
    """
    args = _flash_arguments(sight, q, k, v, mask, offset, segments)
    y, z = (*q.shape[:3], v.shape[3]), q.shape[:3]
    return _call_many('flash_forward', (y, z), *args)


def flash_backward(
    sight: Sight,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kept: tuple[jax.Array, jax.Array],
    d_out: jax.Array,
    mask: jax.Array | None = None,
    offset: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, float32.

    Args:
      sight, q, k, v, mask, offset, segments: as of `flash_forward`.
      kept: what that returned.
      d_out: (B, H, Lq, D) float32, the cotangent of the output.
    """
    args = _flash_arguments(sight, q, k, v, mask, offset, segments)
    (y, z), shape = kept, (*q.shape[:3], v.shape[3])
    _check(y.shape == d_out.shape == shape and z.shape == shape[:3], y, z, d_out)
    _check_dtypes(y, y, z, d_out)
    return _call_many('flash_backward', (q.shape, k.shape, v.shape), *args, y, z, d_out)


def _flash_arguments(
    sight: Sight, q: Any, k: Any, v: Any, mask: Any, offset: Any, segments: Any
) -> tuple[jax.Array, ...]:
    """The arguments that both handlers take."""
    _check_ranks(q=(q, 4), k=(k, 4), v=(v, 4))
    _check_dtypes(k, q, k, v)
    (b, h, n_queries, d), (g, n_keys) = q.shape, k.shape[1:3]
    fits = k.shape == (b, g, n_keys, d) and v.shape[:3] == k.shape[:3] and h == g * (h // max(g, 1))
    _check(fits and not d % DEPTH and not v.shape[3] % DEPTH, q, k, v)
    given = (mask, (b, n_keys), jnp.bool_), (offset, (b,), jnp.int32), (segments, (b, n_keys), None)
    for x, shape, dtype in given:
        if x is not None:
            _check(x.shape == shape, q, k, x)
            if x.dtype != (dtype or jnp.int32):
                raise TypeError(f'expected {jnp.dtype(dtype or jnp.int32).name}, got {x.dtype}')
    _check(segments is None or n_queries == n_keys, q, k)
    factors = jnp.asarray([sight.scale, sight.softcap or 0], jnp.float32)
    limits = jnp.asarray([sight.causal, sight.window or 0], jnp.int32)
    empty = (
        jnp.zeros(0, dtype or jnp.int32) if x is None else jnp.asarray(x) for x, _, dtype in given
    )
    return q, k, v, *empty, factors, limits


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which keys a query of `selected_forward` sees, and how its scores are made.

    Attributes:
      n_buckets: how many there are.
      n_keys: how many keys of its bucket a query sees in a round.
      local_len, n_sinks: how many near keys it sees, and how many of the first.
      causal: whether a query sees positions up to its own only; else half of the keys are behind.
      once: whether a key that is found several times counts once.
      scale: factor of the scores.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
    """

    n_buckets: int
    n_keys: int
    local_len: int
    n_sinks: int
    causal: bool
    once: bool
    scale: float
    softcap: float | None = None


def selected_forward(
    selection: Selection,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    buckets: tuple[jax.Array, jax.Array],
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each query to the keys that it finds.

    Depths are among `DEPTHS`. The result does not depend on the number of threads.

    Args:
      selection: the static part.
      q: (B, H, L, K) float32.
      k, v: (B, G, L, K) float32; G divides H, and neighbouring heads share keys and values.
      buckets: of queries (B, H, R, L) and of keys (B, G, R, L), int32, from 0; one that is out of
        bounds takes the nearest.
      mask: (B, L) bool, True = a real position; or None.
      segments: (B, L) int32, not decreasing: the document of each position; or None.

    Returns:
      The output (B, H, L, K), zero where a query finds no key; and the logsumexp of its scores
      (B, H, L), 1e30 there. Both are float32.
    """
    args = _selected_arguments(selection, q, k, v, buckets, mask, segments)
    return _call_many('selected_forward', (q.shape, q.shape[:3]), *args)


def selected_backward(
    selection: Selection,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    buckets: tuple[jax.Array, jax.Array],
    kept: tuple[jax.Array, jax.Array],
    d_out: jax.Array,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, float32.

    Args:
      selection, q, k, v, buckets, mask, segments: as of `selected_forward`.
      kept: what that returned.
      d_out: (B, H, L, K) float32, the cotangent of the output.
    """
    args = _selected_arguments(selection, q, k, v, buckets, mask, segments)
    y, z = kept
    _check(y.shape == d_out.shape == q.shape and z.shape == q.shape[:3], y, z, d_out)
    _check_dtypes(y, y, z, d_out)
    return _call_many('selected_backward', (q.shape, k.shape, v.shape), *args, y, z, d_out)


def _selected_arguments(
    selection: Selection, q: Any, k: Any, v: Any, buckets: Any, mask: Any, segments: Any
) -> tuple[jax.Array, ...]:
    """The arguments that both handlers take."""
    of_queries, of_keys = buckets
    _check_ranks(q=(q, 4), k=(k, 4), q_buckets=(of_queries, 4), k_buckets=(of_keys, 4))
    _check_dtypes(k, q, k, v)
    (b, h, length, depth), g, rounds = q.shape, k.shape[1], of_queries.shape[2]
    fits = k.shape == v.shape == (b, g, length, depth) and h == g * (h // max(g, 1))
    _check(fits and depth in DEPTHS, q, k, v)
    shapes = (b, h, rounds, length), (b, g, rounds, length)
    _check((of_queries.shape, of_keys.shape) == shapes, q, k, of_queries, of_keys)
    given = (mask, jnp.bool_), (segments, jnp.int32)
    for x, dtype in given:
        if x is not None:
            _check(x.shape == (b, length), q, k, x)
            if x.dtype != dtype:
                raise TypeError(f'expected {jnp.dtype(dtype).name}, got {x.dtype}')
    s, last = selection, max(selection.n_buckets, 1) - 1
    # A bucket is an index of memory.
    of_queries, of_keys = (jnp.clip(x.astype(jnp.int32), 0, last) for x in buckets)
    empty = (jnp.zeros(0, dtype) if x is None else x for x, dtype in given)
    factors = jnp.asarray([s.scale, s.softcap or 0], jnp.float32)
    # Twice the length, since half of the keys may be on each side; sums of more could overflow.
    sizes = _sizes(2 * length, n_keys=s.n_keys, local_len=s.local_len, n_sinks=s.n_sinks)
    limits = jnp.asarray([s.n_buckets, *sizes, s.causal, s.once], jnp.int32)
    return q, k, v, of_queries, of_keys, *empty, factors, limits


def best_blocks(
    q: jax.Array,
    means: jax.Array,
    document: jax.Array,
    ids: jax.Array,
    own: jax.Array,
    n: int,
    causal: bool,
    nothing: int,
) -> jax.Array:
    """The numbers of the blocks of its document that each query likes best, its own left out.

    These have the greatest products q · mean, the greatest first; of equal ones the first comes
    first. They are what sorting all products would give: nothing is approximate. What is NaN or −∞
    is not chosen. The result depends on neither other queries nor the number of threads. Memory is
    linear in P and in N.

    Args:
      q: (B, H, P, K) float32.
      means: (B, G, N, K) float32; G divides H, and neighbouring heads share means.
      document: (B, N) int32, of each block, from 0 and not decreasing; −1 behind the last one for
        what is no block. In a document blocks are numbered 0, 1 …
      ids: (B, P) int32, the document of each query.
      own: (B, P) int32, the number of its block there.
      n: how many to choose, at least 1.
      causal: whether only blocks before its own can be chosen.
      nothing: what stands for a missing block.

    Returns:
      (B, H, n, P) int32.

    Raises:
      ValueError: if shapes do not fit together.
      TypeError: if dtypes are others.
    """
    _check_ranks(q=(q, 4), means=(means, 4))
    _check_dtypes(means, q, means)
    (b, h, p, depth), (g, n_blocks) = q.shape, means.shape[1:3]
    fits = means.shape == (b, g, n_blocks, depth) and h == g * (h // max(g, 1)) and n > 0
    shapes = (document.shape, ids.shape, own.shape) == ((b, n_blocks), (b, p), (b, p))
    _check(fits and shapes, q, means, document, ids, own)
    if any(x.dtype != jnp.int32 for x in (document, ids, own)):
        raise TypeError(f'expected int32, got {document.dtype}, {ids.dtype} and {own.dtype}')
    limits = jnp.asarray([causal, nothing], jnp.int32)
    args = q, means, document, ids, own, limits
    return _call('best_blocks', (b, h, n, p), *args, dtype=jnp.int32)


def _bytes_of_x(n_bytes: int, *more: bool) -> jax.Array:
    """How many bytes of an activation count, and more options, as kernels take them."""
    if n_bytes not in (1, 2):
        raise ValueError(f'n_bytes={n_bytes}: 1 or 2 bytes of an activation count')
    return jnp.asarray([n_bytes, *more], jnp.int32)


def _columns(words: jax.Array) -> int:
    return words.shape[1] * (2 if words.dtype == jnp.uint8 else 1)


def _check_ranks(**expected: tuple[jax.Array, int]) -> None:
    for name, (x, ndim) in expected.items():
        if x.ndim != ndim:
            raise ValueError(f'{name} must have {ndim} axes, got {x.shape}')


def _check(fits: bool, *args: jax.Array) -> None:
    """Checks shapes, which the kernels do not check themselves."""
    if not fits:
        shapes = ', '.join(str(tuple(x.shape)) for x in args)
        raise ValueError(f'the shapes do not fit together: {shapes}')


def _sizes(most: int, **sizes: int) -> list[int]:
    """Sizes of what is seen, which kernels take for how much they write: `most` at most."""
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f'{name}={size} must not be negative')
    return [min(size, most) for size in sizes.values()]


def _check_matrix(words: jax.Array, scales: jax.Array, x: jax.Array) -> None:
    """Checks that groups are whole and each has a scale."""
    _check_dtypes(words, x, scales)
    if words.dtype in (jnp.int8, jnp.uint8):
        n_parts = 2 if words.dtype == jnp.uint8 else 1  # a byte has an int4 of each half of a row
        n_groups = scales.shape[1] // n_parts
        whole = n_groups > 0 and words.shape[1] % n_groups == 0
        fits = scales.shape == (len(words), n_parts * n_groups)
        _check(words.size > 0 and whole and fits, words, scales)
    else:
        _check(words.size > 0 and scales.shape == (0, 0), words, scales)


def _check_dtypes(words: jax.Array, *floats: jax.Array) -> None:
    """Checks dtypes, which the kernels do not check themselves."""
    for x in floats:
        if x.dtype != jnp.float32:
            raise TypeError(f'the kernels take float32, got {x.dtype}')
    if words.dtype not in _WORDS:
        raise TypeError(f'weights must be float32, bfloat16, int8 or uint8, got {words.dtype}')


def _call(
    name: str, shape: tuple[int, ...], *args: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    return _call_many(name, (shape,), *args, dtype=dtype)[0]


def _check_registered() -> None:
    reason = _register()
    if reason is not None:
        raise RuntimeError(f'there are no kernels: {reason}')


def _call_many(
    name: str, shapes: tuple[tuple[int, ...], ...], *args: jax.Array, dtype: Any = jnp.float32
) -> Any:
    _check_registered()
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.ffi.ffi_call(f'layercomb_{name}', results, vmap_method='sequential')(*args)
