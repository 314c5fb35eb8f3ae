"""Which units lie in which expert.

Shape letters: T positions, N units, R experts, M units of one, K chosen experts.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

_ROUNDS = 15


def together(energy: Array, size: int, n_chosen: int, rng: np.random.Generator) -> Array:
    """Units in experts, so that few experts hold most of each position's energy.

    From a random order, two steps alternate. Each position chooses the K experts in which it has
    most energy. Each unit goes to the expert that is chosen where the unit has its energy, as far
    as there is room. The best of all rounds is kept.

    Args:
      energy: (T, N) float32, of the units.
      size: M, which divides N.
      n_chosen: K.
      rng: for the first order.

    Returns:
      (R, M) numbers of units, each once, those of an expert in their order.
    """
    n_experts = energy.shape[1] // size
    expert = rng.permutation(np.repeat(np.arange(n_experts), size))
    best: tuple[float, Array] = (-1.0, expert)
    for _ in range(_ROUNDS):
        on = chosen(energy @ np.eye(n_experts, dtype=np.float32)[expert], n_chosen)
        gain = energy.T @ on  # (N, R)
        held = float(np.take_along_axis(gain, expert[:, None], 1).sum())
        if held <= best[0]:
            break
        best = held, expert
        expert = balanced(gain, size)
    return np.argsort(best[1], kind='stable').reshape(n_experts, size)


def chosen(scores: Array, n_chosen: int) -> Array:
    """1 where a score is among the K largest of its row, else 0: (T, R) → (T, R) float32."""
    on = np.zeros(scores.shape, np.float32)
    best = np.argpartition(-scores, n_chosen - 1, 1)[:, :n_chosen]
    np.put_along_axis(on, best, 1, 1)
    return on


def balanced(gain: Array, size: int) -> Array:
    """An expert for each unit, M units in each: (N, R) → (N,).

    Units apply to the expert of their largest gain. One with too many keeps those of the largest
    gain, and the others apply to their next one, until all have a place.

    Args:
      gain: (N, R), of each unit in each expert.
      size: M.
    """
    wanted = np.argsort(-gain, 1, kind='stable')
    turn = np.zeros(len(gain), int)
    expert = np.full(len(gain), -1)
    free = np.arange(len(gain))
    while len(free):
        expert[free] = wanted[free, turn[free]]
        sent = []
        for e in np.unique(expert[free]):
            held = np.flatnonzero(expert == e)
            sent.append(held[np.argsort(-gain[held, e], kind='stable')[size:]])
        free = np.concatenate(sent)
        turn[free] += 1
    return expert
