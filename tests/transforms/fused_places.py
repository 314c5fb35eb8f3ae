"""Where the values of a program lie, checked."""

import itertools

from layercomb.transforms.fusing.program import Value


def check_places(program, outputs):
    """Values that are needed in the same phases lie apart; returns how many have places."""
    phases = program._phases()
    begins, size = program._begins(phases, outputs)
    born, last = {}, {}
    for p, phase in enumerate(phases):
        for each in phase:
            for token in (*each.reads, *each.writes):
                if isinstance(token, Value):
                    born.setdefault(token, p)
                    last[token] = p
    placed = [v for v in born if begins[v.number] >= 0]
    for a, b in itertools.combinations(placed, 2):
        meet = born[a] <= last[b] and born[b] <= last[a]
        at_a, at_b = begins[a.number], begins[b.number]
        apart = at_a + a.width <= at_b or at_b + b.width <= at_a
        assert apart or not meet, (a, b)
    assert all(begins[v.number] + v.width <= size for v in placed)
    return len(placed)
