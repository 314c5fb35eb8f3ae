"""Functions as layers, whether or not they say how many arrays they take."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.model import Model

X = jnp.linspace(-1, 2, 6)[None]
Y = 1 - X


def run(layer, *inputs):
    made = Model(tl.Serial(layer)).init(inputs)(*inputs)
    eager, _ = layer.apply({}, {}, inputs)
    for a, b in zip(made if isinstance(made, tuple) else (made,), eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    return made


def gate(x, y, *, scale=2.0):
    return scale * x * jnp.tanh(y)


class Scale:
    def __init__(self, factor=3.0):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x

    def times(self, x, power=1):
        return self.factor * x**power

    @staticmethod
    def both(x, y):
        return x + y


CLIP = functools.partial(jnp.clip, min=0.0, max=1.0)


def test_a_function_whose_first_argument_has_a_default_says_how_many_it_is_given():
    with pytest.raises(TypeError, match=r"Fn\('Clip'\): .* default for every arg.*say .* n_in="):
        tl.Fn('Clip', CLIP)
    net = tl.Fn('Clip', CLIP, n_in=1)
    np.testing.assert_array_equal(run(net, X), np.clip(X, 0, 1))
    assert 'n_in=1' in repr(net)


@pytest.mark.parametrize(
    'f',
    [
        jnp.clip,
        jax.jit(CLIP),
        lambda x=0.0: x,
        lambda x=0.0, y=1.0: x,
        Scale,
        max,
        np.vectorize(lambda x: x),
        lambda *xs: xs[0],
        lambda *xs, scale=1: xs[0],
        functools.partial(lambda *xs: xs[0], 1),
    ],
)
def test_what_does_not_say_how_many_it_takes_is_refused_and_told_the_cure(f):
    with pytest.raises(TypeError, match=r"Fn\('F'\): .*: say how many with n_in="):
        tl.Fn('F', f)


@pytest.mark.parametrize(
    ('f', 'wanted'),
    [
        (jnp.add, X + Y),
        (np.add, X + Y),
        (jax.jit(jnp.add), X + Y),
        (jnp.arctan2, jnp.arctan2(X, Y)),
        (gate, gate(X, Y)),
        (functools.partial(gate, scale=3.0), gate(X, Y, scale=3.0)),
        (jax.jit(gate), gate(X, Y)),
        (jax.checkpoint(gate), gate(X, Y)),
        (jax.vmap(gate), gate(X, Y)),
        (Scale.both, X + Y),
        (Scale(2.0).both, X + Y),
        (lambda x, y, power=2: x**power + y, X**2 + Y),
    ],
)
def test_two_arrays_are_counted(f, wanted):
    if f is np.add:
        assert tl.Fn('F', f).n_in == 2
        return
    layer = tl.Fn('F', f)
    assert (layer.n_in, layer.n_out) == (2, 1)
    np.testing.assert_allclose(run(layer, X, Y), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ('f', 'wanted'),
    [
        (jnp.tanh, np.tanh(X)),
        (jnp.exp, np.exp(X)),
        (jax.nn.leaky_relu, jax.nn.leaky_relu(X)),
        (functools.partial(gate, X), gate(X, X)),
        (functools.partial(jnp.mean, axis=1), np.mean(X, 1)),
        (Scale(2.0), 2 * X),
        (Scale(2.0).times, 2 * X),
        (functools.partial(Scale(2.0).times, power=2), 2 * X**2),
    ],
)
def test_one_array_is_counted(f, wanted):
    layer = tl.Fn('F', f)
    assert layer.n_in == 1
    np.testing.assert_allclose(run(layer, X), wanted, rtol=1e-6)


def test_no_array_is_counted_where_there_is_no_parameter():
    layer = tl.Fn('Ones', lambda: jnp.ones(3))
    assert (layer.n_in, layer.n_out) == (0, 1)
    (y,), _ = layer.apply({}, {}, ())
    assert (y == 1).all()


def test_arguments_by_keyword_alone_are_refused_when_the_layer_is_made():
    for f in (lambda x, *, y: x + y, functools.partial(gate, x=X)):
        for n_in in (None, 1):
            with pytest.raises(
                TypeError, match=r"'y' must be given by keyword: bind it, functools"
            ):
                tl.Fn('F', f, n_in=n_in)
    assert tl.Fn('F', functools.partial(lambda x, *, y: x + y, y=1)).n_in == 1


def test_a_count_that_the_function_cannot_take_is_refused_when_the_layer_is_made():
    for f, n_in in ((lambda x: x, 2), (gate, 1), (gate, 3), (jnp.tanh, 0)):
        with pytest.raises(
            TypeError, match=rf'cannot be called with n_in={n_in} arrays \(.*\): se'
        ):
            tl.Fn('F', f, n_in=n_in)
    with pytest.raises(ValueError, match='Fn: n_in must be at least 0, got -1'):
        tl.Fn('F', lambda *xs: xs, n_in=-1)


def test_a_number_of_outputs_in_the_place_of_that_of_inputs_is_found_out():
    with pytest.raises(TypeError, match='cannot be called with n_in=2 arrays'):
        tl.Fn('Two', lambda x: (x, x), 2)


def test_a_layer_is_no_function():
    for f in (tl.Relu(), tl.Relu):
        with pytest.raises(TypeError, match=r"Fn\('F'\): Relu.* is a layer: use it as it is"):
            tl.Fn('F', f)


@pytest.mark.parametrize(
    ('f', 'got'),
    [
        (lambda x: None, 'NoneType'),
        (lambda x: {'y': x}, 'dict'),
        (lambda x: (x, 'text'), r'float32\[1,6\], str'),
        (lambda x: (x, [x]), r'float32\[1,6\], list'),
        (lambda x: object(), 'object'),
    ],
)
def test_what_a_function_gives_beside_arrays_is_named(f, got):
    layer = tl.Fn('F', f)
    text = rf"Fn\('F'\): .* must give an array, or a tuple of arrays, and gave {got}: return"
    with pytest.raises(TypeError, match=text):
        layer.apply({}, {}, (X,))
    with pytest.raises(TypeError, match=text):
        tl.Serial(layer, tl.Dense(2)).init((X,), jax.random.key(0))


def test_another_number_of_outputs_is_named_at_every_entrance():
    text = r"Fn promises n_out=1 and returned 2 values: give Fn\('Two', …\) n_out=2, or return"
    layer = tl.Fn('Two', lambda x: (x, x))
    with pytest.raises(TypeError, match=text):
        layer.apply({}, {}, (X,))
    with pytest.raises(TypeError, match=text):
        layer.output_signature(X)
    with pytest.raises(TypeError, match='promises n_out=2 and returned 1 values'):
        tl.Fn('One', lambda x: x, n_out=2).apply({}, {}, (X,))
    first, second = run(tl.Fn('Two', lambda x: [x, -x], n_out=2), X)
    np.testing.assert_array_equal(first, -second)


def test_a_python_number_is_an_array_for_the_layer_after_it():
    net = tl.Serial(tl.Fn('Length', lambda x: x.shape[1]), tl.Fn('Half', lambda n: n / 2))
    assert float(run(net, X)) == 3.0
    shape = tl.Fn('Half', lambda x: 0.5).output_signature(X)[0]
    assert (shape.shape, shape.dtype) == ((), jnp.float32)


def test_a_function_of_optional_arrays_takes_as_many_as_are_said():
    where = tl.Fn('Where', jnp.where, n_in=3)
    np.testing.assert_array_equal(run(where, X > 0, X, Y), np.where(X > 0, X, Y))
