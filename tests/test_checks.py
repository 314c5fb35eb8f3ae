"""One family of checks: the same words about the same mistake, wherever a value is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercomb import data, optimizers, serving, tl
from layercomb.checks import (
    Bound,
    Count,
    Fraction,
    Positive,
    Rate,
    Size,
    check_value,
    checked,
    fault,
    plain,
    take_fields,
)
from layercomb.supervised.decoding.sampling import Sampler

if TYPE_CHECKING:
    from nowhere import Unknown


class Reads(Protocol):
    def read(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Settings:
    n: Size = 1
    share: Fraction = 0.5
    shape: tuple[Size, Size] | None = None
    strange: Unknown = None

    def __post_init__(self):
        take_fields(self)


@checked
def function(
    n: Size, many: Sequence[Count] = (), how: Positive | Callable[[Any], Any] = 1.0,
    source: Reads | None = None, flag: bool = False, *, strange: Unknown = None,
):  # fmt: skip
    return n, many, how, source, flag, strange


BOUNDS = st.builds(
    Bound,
    st.none() | st.integers(-3, 3),
    st.none() | st.integers(-3, 3),
    above=st.none() | st.integers(-3, 3),
    high=st.none() | st.integers(-3, 3),
)


@given(BOUNDS, st.integers(-4, 4) | st.floats())
def test_a_bound_holds_what_its_words_say(bound, value):
    compare = {
        'at least': value.__ge__,
        'above': value.__gt__,
        'below': value.__lt__,
        'at most': value.__le__,
    }
    rules = [rule.rsplit(' ', 1) for rule in str(bound).split(' and ') if rule]
    assert bound.holds(value) == all(compare[words](int(end)) is True for words, end in rules)


def test_infinity_and_nan_lie_in_no_finite_range():
    for bound in (Bound(0, math.inf), Bound(above=0, below=math.inf), Bound(0, high=1)):
        assert not bound.holds(math.nan) and not bound.holds(math.inf)
    assert str(Bound(0, high=2**32 - 1)) == 'at least 0 and at most 4294967295'


WORDS = [
    (lambda: tl.Dense('8'), TypeError, "Dense: n_units must be an int or None, got '8'"),
    (lambda: tl.Dropout('8'), TypeError, "Dropout: rate must be a number, got '8'"),
    (lambda: data.copy('8'), TypeError, "copy: max_length must be an int, got '8'"),
    (lambda: data.packed(['a'], '8', 1), TypeError, "packed: length must be an int, got '8'"),
    (lambda: optimizers.adamw('8'), TypeError, 'adamw: learning_rate must be a number or a'),
    (
        lambda: serving.Limits(max_tokens='8'),
        TypeError,
        'Limits: max_tokens must be an int, got',
    ),
    (lambda: Sampler('8'), TypeError, "Sampler: temperature must be a number, got '8'"),
    (lambda: tl.Dense(0), ValueError, 'Dense: n_units must be at least 1, got 0'),
    (lambda: data.copy(0), ValueError, 'copy: max_length must be at least 1, got 0'),
    (lambda: data.packed(['a'], 0, 1), ValueError, 'packed: length must be at least 1, got 0'),
    (lambda: optimizers.adamw(-1), ValueError, 'adamw: learning_rate must be at least 0, got -1'),
    (
        lambda: serving.Limits(max_tokens=0),
        ValueError,
        'Limits: max_tokens must be at least 1',
    ),
    (lambda: Sampler(top_k=0), ValueError, 'Sampler: top_k must be at least 1, got 0'),
    (lambda: function(1, flag=1), TypeError, 'function: flag must be a bool, got 1'),
    (lambda: function(1, [1, -1]), ValueError, r'many must be at least 0, got \(1, -1\)'),
    (lambda: function(1, how=math.inf), ValueError, 'how must be above 0 and finite, got inf'),
    (lambda: Settings(shape=(1, 2, 3)), TypeError, 'shape must be a tuple of 2 int or None'),
]


@pytest.mark.parametrize(('make', 'error', 'words'), WORDS)
def test_one_mistake_has_one_wording(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize('kind', [int, np.int64, np.uint8, jnp.int32, np.array])
def test_integers_of_any_library_become_pythons(kind):
    n, many, *_ = function(kind(3), [kind(0), kind(1)])
    assert (n, many) == (3, (0, 1)) and {type(x) for x in (n, *many)} == {int}
    assert function(1, np.arange(3))[1] == function(1, range(3))[1] == (0, 1, 2)
    made = Settings(kind(3), np.float32(0.5), [kind(1), kind(2)])
    assert made == Settings(3, 0.5, (1, 2)) and type(made.share) is float


def test_an_int_is_a_float_where_one_is_asked_for():
    assert type(check_value('x', 'rate', 0, Rate)) is float
    assert type(check_value('x', 'n', 0, Annotated[float, Bound(0)] | None)) is float
    assert type(check_value('x', 'n', 0, int | float)) is int
    assert type(Settings(share=1).share) is float
    assert type(function(1, how=2)[2]) is int  # arguments of functions stay what they are


def test_what_is_no_number_is_passed_on_as_it_is():
    source = [object()]
    schedule = lambda step: step  # noqa: E731
    assert function(1, how=schedule, source=source)[2:4] == (schedule, source)
    assert function(1, source=source)[3] is source  # what uses a protocol checks it


def test_annotations_that_only_a_type_checker_knows_hide_no_other():
    assert function(1, strange=5)[5] == 5
    with pytest.raises(TypeError, match='Settings: n must be an int'):
        Settings(n='1', strange=object())


def test_a_traced_number_is_refused_in_words():
    with pytest.raises(TypeError, match='function: n must be an int, got'):
        jax.jit(lambda n: function(n)[0])(3)


def test_arguments_that_a_function_has_not_raise_as_ever():
    with pytest.raises(TypeError, match='unexpected keyword argument'):
        function(1, m=2)
    with pytest.raises(TypeError, match='positional argument'):
        function(1, (), 1.0, None, False, 6)
    with pytest.raises(TypeError, match='multiple values'):
        function(1, n=2)


def test_a_long_value_is_cut():
    with pytest.raises(TypeError) as caught:
        function('x' * 10_000)
    assert len(str(caught.value)) < 300


@given(st.recursive(st.integers() | st.booleans() | st.floats(allow_nan=False), st.lists))
def test_plain_of_what_is_plain(value):
    def as_tuples(x):
        return tuple(map(as_tuples, x)) if isinstance(x, list) else x

    assert plain(value) == as_tuples(value)


def test_faults():
    assert fault(None, Size | None) is None
    assert fault(True, int) == (TypeError, 'an int')
    assert fault((1, 0), tuple[Size, ...]) == (ValueError, 'at least 1')
