"""Bytes of buffers in each memory at the peak of a traced program: `peaks`.

The program is the one that JAX hands to the compiler. JAX's types say of each array whether it is
in host memory. Counted are the arrays that are still to be used, at any equation, those inside of
loops included. What any compiler of these programs does with buffers is followed: the carry of a
loop is one buffer from its first value to its last, and an update writes over an array that is not
used again. What compilers do beyond (they fuse, and order anew) is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

INLINED = (
    'jit',
    'pjit',
    'closed_call',
    'custom_vjp_call',
    'custom_jvp_call',
    'remat2',
    'checkpoint',
)
IN_PLACE = ('dynamic_update_slice', 'scatter', 'scatter-add', 'scatter_add')
FREE = ('reshape', 'squeeze', 'expand_dims')  # the same bytes by another shape


class Peak(NamedTuple):
    """The most bytes at any equation, of two memories, each with the arrays that make it up."""

    device: int
    host: int
    arrays: tuple[tuple[int, str], ...]


class Equation(NamedTuple):
    """An equation of a program without calls."""

    name: str
    read: list[Any]
    made: list[Any]
    params: dict[str, Any]


class Value:
    """A value of a program, with its size and memory."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval
        self.on_host = getattr(aval, 'memory_space', None) == jax.memory.Space.Host
        if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            self.size = 0
        else:
            self.size = int(np.prod(aval.shape)) * aval.dtype.itemsize


def flat(jaxpr: Any, given: list[Value]) -> tuple[list[Equation], list[Any]]:
    """The equations of a program with all calls inlined, and its outputs.

    Args:
      jaxpr: a program.
      given: its inputs.
    """
    values: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
    values |= {v: Value(v.aval) for v in jaxpr.constvars}
    made: list[Equation] = []

    def value(v: Any) -> Any:
        return None if hasattr(v, 'val') else values[v]

    for eqn in jaxpr.eqns:
        read = [value(v) for v in eqn.invars]
        name = eqn.primitive.name
        inner = next((x for k, x in eqn.params.items() if k in ('jaxpr', 'call_jaxpr')), None)
        if name in INLINED and inner is not None:
            inner = getattr(inner, 'jaxpr', inner)
            its = [Value(v.aval) if r is None else r for v, r in zip(eqn.invars, read, strict=True)]
            equations, outputs = flat(inner, its)
            made += equations
            for v, out in zip(eqn.outvars, outputs, strict=True):
                values[v] = Value(v.aval) if out is None else out
            continue
        values |= {v: Value(v.aval) for v in eqn.outvars}
        made.append(Equation(name, read, [values[v] for v in eqn.outvars], eqn.params))
    return made, [value(v) for v in jaxpr.outvars]


class Memory:
    """What is alive while a program is gone through."""

    def __init__(self) -> None:
        self.now = {False: 0, True: 0}
        self.most = {False: 0, True: 0}
        self.alive: dict[int, tuple[Value, str]] = {}
        self.at_peak: tuple[tuple[int, str], ...] = ()

    def take(self, value: Value, why: str) -> int:
        """A new buffer."""
        number = next(_NUMBERS)
        self.alive[number] = value, why
        self.now[value.on_host] += value.size
        if self.now[value.on_host] > self.most[value.on_host]:
            self.most[value.on_host] = self.now[value.on_host]
            if not value.on_host:
                self.at_peak = tuple(
                    (v.size, f'{v.aval.str_short()} {w}')
                    for v, w in self.alive.values()
                    if not v.on_host
                )
        return number

    def of(self, buffers: dict[int, int], value: Value) -> int:
        """The buffer of a value; a constant gets one when it is first asked for."""
        if id(value) not in buffers:
            buffers[id(value)] = self.take(value, 'constant')
        return buffers[id(value)]

    def drop(self, number: int) -> None:
        """Frees a buffer."""
        value, _ = self.alive.pop(number)
        self.now[value.on_host] -= value.size


_NUMBERS = itertools.count()


def peaks(jaxpr: Any) -> Peak:
    """The peak of a program, its arguments included.

    Args:
      jaxpr: of a traced function.
    """
    memory = Memory()
    given = [Value(v.aval) for v in jaxpr.invars]
    buffers = {id(v): memory.take(v, 'argument') for v in given}
    through(memory, jaxpr, given, buffers, set(buffers.values()))
    found = sorted(memory.at_peak, reverse=True)
    return Peak(memory.most[False], memory.most[True], tuple(found))


def through(
    memory: Memory, jaxpr: Any, given: list[Value], buffers: dict[int, int], own: set[int]
) -> list[int | None]:
    """Goes through a program.

    Args:
      memory: what is alive.
      jaxpr: the program.
      given: its inputs.
      buffers: id of a value -> its buffer, of the inputs.
      own: buffers that the program may free and write over.

    Returns:
      The buffers of its outputs.
    """
    equations, outputs = flat(jaxpr, given)
    last: dict[int, int] = {}
    for i, eqn in enumerate(equations):
        last |= {id(v): i for v in eqn.read if v is not None}
    last |= {id(v): len(equations) for v in outputs if v is not None}
    uses: dict[int, int] = {}  # buffer -> when its last value is read
    for value in given:
        buffer = buffers.get(id(value))
        if buffer is not None:
            uses[buffer] = max(uses.get(buffer, -1), last.get(id(value), -1))
    for i, eqn in enumerate(equations):

        def dies(value: Any, i: int = i) -> int | None:
            """The buffer of a value that is not used after this, if it may be written over."""
            buffer = None if value is None else buffers.get(id(value))
            return buffer if buffer in own and uses[buffer] == i else None  # type: ignore[index]

        _go(memory, eqn, buffers, own, dies)
        for value in eqn.made:
            buffer = buffers[id(value)]
            uses[buffer] = max(uses.get(buffer, -1), last.get(id(value), i))
        read = {
            buffers[id(v)] for v in (*eqn.read, *eqn.made) if v is not None and id(v) in buffers
        }
        for buffer in read & own:
            if uses[buffer] <= i:
                memory.drop(buffer)
                own.discard(buffer)
    return [None if v is None else buffers[id(v)] for v in outputs]


def _go(
    memory: Memory, eqn: Equation, buffers: dict[int, int], own: set[int], dies: Callable[..., Any]
) -> None:
    """One equation: its outputs get buffers, and what it computes inside is gone through."""
    if eqn.name == 'scan':
        _loop(memory, eqn, buffers, own, dies)
        return
    if eqn.name == 'while':
        _loop(memory, _as_scan(eqn), buffers, own, dies)
        return
    if eqn.name == 'cond':
        for branch in eqn.params['branches']:
            given = [Value(v.aval) for v in branch.jaxpr.invars]
            inner = {
                id(v): memory.of(buffers, read)
                for v, read in zip(given, eqn.read[1:], strict=True)
                if read is not None
            }
            for value in given:
                memory.of(inner, value)
            its_own: set[int] = set()
            through(memory, branch.jaxpr, given, inner, its_own)
            for number in its_own:
                memory.drop(number)
    if eqn.name in IN_PLACE + FREE and eqn.read[0] is not None:
        over = memory.of(buffers, eqn.read[0]) if eqn.name in FREE else dies(eqn.read[0])
        if over is not None:
            buffers[id(eqn.made[0])] = over
            return
    for value in eqn.made:
        buffers[id(value)] = memory.take(value, eqn.name)
        own.add(buffers[id(value)])


def _as_scan(eqn: Equation) -> Equation:
    """A while loop as a scan over nothing; its condition makes nothing large."""
    n, m = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
    params = {'num_consts': m, 'num_carry': len(eqn.made), 'jaxpr': eqn.params['body_jaxpr']}
    return Equation('scan', eqn.read[n:], eqn.made, params)


def _loop(
    memory: Memory, eqn: Equation, buffers: dict[int, int], own: set[int], dies: Callable[..., Any]
) -> None:
    """A scan: its carry is one buffer from the first value to the last."""
    n_consts, n_carry = eqn.params['num_consts'], eqn.params['num_carry']
    body = eqn.params['jaxpr'].jaxpr
    given = [Value(v.aval) for v in body.invars]
    inner: dict[int, int] = {}
    inner_own: set[int] = set()
    taken: set[int] = set()
    for value, read in zip(given[:n_consts], eqn.read[:n_consts], strict=True):
        if read is not None:
            inner[id(value)] = memory.of(buffers, read)
    carried = []
    for k in range(n_carry):
        read, made = eqn.read[n_consts + k], eqn.made[k]
        over = dies(read)
        if over is None or over in taken:
            over = memory.take(made, 'carry')
            own.add(over)
        taken.add(over)
        carried.append(over)
        buffers[id(made)] = over
        inner[id(given[n_consts + k])] = over
    for value in eqn.made[n_carry:]:
        buffers[id(value)] = memory.take(value, 'stacked by a loop')
        own.add(buffers[id(value)])
    slices = [memory.take(v, 'slice in a loop') for v in given[n_consts + n_carry :]]
    inner |= {id(v): s for v, s in zip(given[n_consts + n_carry :], slices, strict=True)}
    inner_own |= set(slices) | set(carried)
    hidden = {number: memory.alive[number] for number in carried}
    for value in given[:n_consts]:  # constants without a variable
        memory.of(inner, value)
    outputs = through(memory, body, given, inner, inner_own)
    for number in inner_own:
        if number not in carried and number in memory.alive:
            memory.drop(number)
    for number in carried:  # the last value is in the carry's buffer again
        if number not in memory.alive:
            memory.alive[number] = hidden[number]
            memory.now[hidden[number][0].on_host] += hidden[number][0].size
    del outputs
