"""Declarations of axes: what they say, and those that cannot be read."""

from __future__ import annotations

import pytest

import layercomb as lc
from layercomb.layers.facts.axes import Axes, undeclared


@pytest.mark.parametrize(
    ('spec', 'letters', 'separate', 'summed', 'given'),
    [
        ('D->F', 'DF', (), (0,), (1,)),
        ('F<-D', 'FD', (), (1,), (0,)),
        ('D->HK', 'DHK', (), (0,), (1, 2)),
        ('HK->D', 'HKD', (), (0, 1), (2,)),
        ('E|D->F', 'EDF', (0,), (1,), (2,)),
        ('YX|D->F', 'YXDF', (0, 1), (2,), (3,)),
        ('H|->K', 'HK', (0,), (), (1,)),
        ('->F', 'F', (), (), (0,)),
        ('->', '', (), (), ()),
        ('V:D', 'VD', (), (), ()),
        ('F*<-D', 'FD', (), (1,), (0,)),
        ('F*->D', 'FD', (), (0,), (1,)),
    ],
)
def test_what_a_declaration_says(spec, letters, separate, summed, given):
    axes, stacked = Axes(spec), Axes(spec, stacked=2)
    assert axes.letters == stacked.letters == tuple(letters)
    assert (axes.separate, axes.summed, axes.given) == (separate, summed, given)
    assert (axes.ndim, stacked.ndim) == (len(letters), len(letters) + 2)
    assert stacked.separate == (0, 1, *(a + 2 for a in separate))
    assert stacked.summed == tuple(a + 2 for a in summed)
    assert stacked.given == tuple(a + 2 for a in given)
    every = sorted(stacked.separate + stacked.first + stacked.second)
    assert every == list(range(stacked.ndim))
    kinds = axes.is_vector, axes.is_matrix, axes.is_table
    assert kinds == (not summed and spec != 'V:D', bool(summed), spec == 'V:D')
    assert axes.has_chosen_rows == ('*' in spec) and axes.is_declared and axes.is_known


def test_an_axis_made_of_two_is_one():
    assert Axes('D<-(HK)', 1).letters == ('D', '(HK)') and Axes('D<-(HK)', 1).summed == (2,)


def test_without_a_declaration_a_weight_is_a_vector_or_unknown():
    assert [undeclared(n, 1).is_vector for n in (1, 2, 3)] == [True, True, False]
    assert [undeclared(n, 1).is_known for n in (1, 2, 3)] == [True, True, False]
    assert [undeclared(n, 1).ndim for n in (1, 2, 3)] == [1, 2, 3]
    assert not undeclared(1, 0).is_declared


@pytest.mark.parametrize(
    ('spec', 'said'),
    [
        ('io', "Mine: the axes of 'kernel': 'io' cannot be read: write capitals, such as 'D->F'"),
        ('D=>F', 'cannot be read'),
        ('DF', 'cannot be read'),
        ('', 'cannot be read'),
        ('D F', 'cannot be read'),
        ('D*H->F', 'cannot be read'),
        ('D->D', 'has a letter twice: give each axis its own'),
        ('E|E->F', 'has a letter twice'),
        ('D->', "says nothing after '->': write a vector as '->F'"),
        ('<-D', "says nothing before '<-'"),
        (':D', "says nothing before ':'"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_an_error_of_the_class(spec, said):
    with pytest.raises(ValueError, match=said.replace('*', r'\*')):
        type('Mine', (lc.Layer,), {'weight_axes': {'kernel': spec}})


def test_declarations_are_a_dict_of_texts():
    with pytest.raises(TypeError, match=r"Mine: weight_axes='D->F': give a dict such as {'kernel'"):
        type('Mine', (lc.Layer,), {'weight_axes': 'D->F'})
    with pytest.raises(TypeError, match="Mine: the axes of 'kernel' must be a text such as"):
        type('Mine', (lc.Layer,), {'weight_axes': {'kernel': ('D', 'F')}})
