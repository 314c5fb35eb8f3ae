"""Combinators: the arithmetic of the stack, names, keys, and what errors say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercomb import tl, trees
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype

X = shape_dtype((2, 5, 8))


class Plus(Layer):
    """x + amount, for numbers; a float32 stream needs no weights to be told apart."""

    amount: int

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0] + self.amount,), state


class Noise(Layer):
    """Puts out its key's numbers, so that tests see which key came."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (jax.random.uniform(rng, (3,)),), state


class Seen(Layer):
    """Counts how often it is initialised and applied."""

    calls = {'init': 0, 'apply': 0}

    def init(self, signature, rng, mode=Mode.TRAIN):
        self.calls['init'] += 1
        return {}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        self.calls['apply'] += 1
        return inputs, state


class Liar(Layer):
    """Says that it puts out two values, and puts out one."""

    n_out = 2

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, state


def our_notes(error: BaseException) -> list[str]:
    return [n for n in getattr(error, '__notes__', []) if n.startswith('in ')]


def run(layer, *inputs, weights=None, mode=Mode.EVAL, rng=None):
    return layer.apply(weights or {}, {}, inputs, mode=mode, rng=rng)[0]


# The stack, against a machine of Python lists.


def needs(layer: Layer) -> int:
    """How many values a layer consumes of an endless stack."""
    for n in range(30):
        try:
            machine(layer, list(range(n)))
        except IndexError:
            continue
        return n
    raise AssertionError('endless')


def pop(stack: list[int]) -> int:
    return stack.pop(0)


def machine(layer: Layer, stack: list[int]) -> list[int]:
    """What a layer makes of a stack of numbers, its top first: slow and obvious."""
    stack = list(stack)
    match layer:
        case Plus(amount=n):
            return [pop(stack) + n, *stack]
        case tl.Dup(n=n):
            values = [pop(stack) for _ in range(n)]
            return values + values + stack
        case tl.Drop(n=n):
            for _ in range(n):
                pop(stack)
            return stack
        case tl.Swap():
            a, b = pop(stack), pop(stack)
            return [b, a, *stack]
        case tl.Select(indices=indices, n_in=n):
            values = [pop(stack) for _ in range(n)]
            return [values[i] for i in indices] + stack
        case tl.Add():
            return [pop(stack) + pop(stack), *stack]
        case tl.Multiply():
            return [pop(stack) * pop(stack), *stack]
        case tl.Serial(layers=layers):
            if not layers:
                return [pop(stack), *stack]
            for inner in layers:
                stack = machine(inner, stack)
            return stack
        case tl.Parallel(layers=layers):
            out = []
            for inner in layers:
                taken = [pop(stack) for _ in range(needs(inner))]
                out += machine(inner, taken)
            return out + stack
        case tl.Branch(layers=layers):
            out, most = [], max(map(needs, layers), default=0)
            taken = [pop(stack) for _ in range(most)]
            for inner in layers:
                out += machine(inner, taken[: needs(inner)])
            return out + stack
        case tl.Residual(layers=layers, shortcut=shortcut):
            body = tl.Serial(*layers)
            way = shortcut or tl.Serial()
            taken = [pop(stack) for _ in range(max(needs(body), needs(way)))]
            y, *more = machine(body, taken[: needs(body)])
            return [machine(way, taken)[0] + y, *more, *stack]
    raise AssertionError(layer)


leaves = st.one_of(
    st.integers(1, 9).map(Plus),
    st.integers(1, 2).map(tl.Dup),
    st.integers(1, 2).map(tl.Drop),
    st.just(tl.Swap()),
    st.just(tl.Add()),
    st.just(tl.Multiply()),
    st.builds(
        lambda n, more: tl.Select([i % n for i in more], n),
        st.integers(1, 3),
        st.lists(st.integers(0, 5), max_size=3),
    ),
)


def has_output(layer: Layer) -> bool:
    return tl.Serial(*layer.layers).n_out > 0


def combined(inner):
    some = st.lists(inner, max_size=4)
    return st.one_of(
        some.map(lambda layers: tl.Serial(*layers)),
        some.map(lambda layers: tl.Parallel(*layers)),
        some.map(lambda layers: tl.Branch(*layers)),
        some.map(lambda layers: tl.Residual(*layers)).filter(has_output),
        st.builds(
            lambda a, b: tl.Residual(a, shortcut=b), inner, st.integers(1, 9).map(Plus)
        ).filter(has_output),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.recursive(leaves, combined, max_leaves=12))
def test_the_stack_is_that_of_a_machine_of_lists(layer):
    n = needs(layer)
    numbers = [3 + i for i in range(n)]
    wanted = machine(layer, numbers)
    assert layer.n_in == n
    assert layer.n_out == len(wanted)
    outputs = run(layer, *(np.int64(i) for i in numbers))
    assert [int(y) for y in outputs] == wanted


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.recursive(leaves, combined, max_leaves=6))
def test_init_and_apply_agree_about_the_stack(layer):
    signature = tuple(shape_dtype((), 'int32') for _ in range(layer.n_in))
    assert len(layer.output_signature(signature)) == layer.n_out


def test_combinators_of_nothing():
    assert (tl.Serial().n_in, tl.Serial().n_out) == (1, 1)
    assert run(tl.Serial(), 7) == (7,)
    for nothing in (tl.Parallel(), tl.Branch()):
        assert (nothing.n_in, nothing.n_out) == (0, 0)
        assert nothing.init((), jax.random.key(0)) == ({}, {})
        assert run(nothing) == ()
        assert run(tl.Serial(nothing, Plus(1)), 7) == (8,)
    assert run(tl.Residual(), np.float32(7)) == (14,)


def test_values_beneath_pass_by_untouched():
    net = tl.Serial(Plus(1), tl.Swap(), Plus(10), tl.Swap())
    assert (net.n_in, net.n_out) == (2, 2)
    assert run(net, 1, 2) == (2, 12)


def test_lists_are_flattened_and_none_is_left_out():
    assert tl.Serial([Plus(1), (Plus(2), [None])], None) == tl.Serial(Plus(1), Plus(2))


def test_select_takes_more_than_it_uses():
    drop = tl.Select([], n_in=1)
    assert (drop.n_in, drop.n_out, run(drop, 5)) == (1, 0, ())
    with pytest.raises(ValueError, match=r'indices \[2\] must lie between 0 and n_in - 1 = 1'):
        tl.Select([2], n_in=2)
    with pytest.raises(ValueError, match=r'indices \[-1\] must lie between'):
        tl.Select([-1])


# Names.


def test_names_come_from_classes_and_collide_in_order():
    net = tl.Serial(tl.Dense(4), tl.Dense(4, name='dense_1'), tl.Dense(4), tl.LayerNorm(), Plus(1))
    assert net.keys == ('dense', 'dense_1', 'dense_2', 'layer_norm', 'plus')
    assert tl.Serial(tl.Repeat(tl.Remat(tl.Dense(4, name='a')), 2)).keys == ('a',)
    assert tl.Serial(tl.Chunk(tl.Dense(4)), tl.Fn('Sum', jnp.add)).keys == ('dense', 'sum')
    assert tl.Residual(tl.Add(), tl.Dup(), shortcut=tl.Dense(4)).keys[-2:] == ('shortcut', 'add')
    assert tl.Serial(tl.RMSNorm(), tl.Conv1D(4)).keys == ('rms_norm', 'conv1d')


def test_weightless_layers_leave_no_key():
    weights, state = tl.Serial(tl.Relu(), tl.Residual(tl.Dense(8), tl.Relu())).init(
        (X,), jax.random.key(0)
    )
    assert list(trees.flatten(weights)) == ['residual/dense/bias', 'residual/dense/kernel']
    assert state == {}


def test_two_explicit_names_clash():
    with pytest.raises(ValueError, match="Serial: two sublayers are named 'a': rename one"):
        tl.Serial(tl.Dense(4, name='a'), tl.Remat(tl.Relu(name='a')))
    with pytest.raises(ValueError, match="Residual: two sublayers are named 'shortcut'"):
        tl.Residual(tl.Dense(4, name='shortcut'), shortcut=tl.Dense(4))


@pytest.mark.parametrize('name', ['a/b', ''])
def test_names_that_would_break_paths_are_refused(name):
    with pytest.raises(ValueError, match=r'cannot be named .*names have no "/" and are not empty'):
        tl.Dense(4, name=name)


# Residual.


def test_residual_adds_in_the_dtype_of_the_stream():
    narrow = tl.Fn('Narrow', to_bfloat16)
    (y,) = run(tl.Residual(narrow), jnp.full((2,), 1.0625))
    assert y.dtype == jnp.float32 and (y == 2.125).all()
    (y,) = run(tl.Residual(tl.Fn('Wide', to_float32)), jnp.ones(2, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def to_bfloat16(x):
    return x.astype(jnp.bfloat16)


def to_float32(x):
    return x.astype(jnp.float32)


def test_residual_puts_further_outputs_beneath_the_sum():
    net = tl.Residual(tl.Dup(), Plus(5))
    assert (net.n_in, net.n_out) == (1, 2)
    assert run(net, np.float32(1)) == (7, 1)


def test_residual_of_nothing_to_add_is_refused():
    with pytest.raises(ValueError, match='its layers leave nothing to add'):
        tl.Serial(tl.Residual(tl.Drop())).output_signature(X)


def test_residual_that_changes_the_width_says_how_to_keep_it():
    with pytest.raises(
        ValueError, match=r'cannot add \(2, 5, 4\) to \(2, 5, 8\).*Dense\(8\).*shortcut='
    ):
        tl.Residual(tl.Dense(4)).output_signature(X)
    assert tl.Residual(tl.Dense(4), shortcut=tl.Dense(4)).output_signature(X)[0].shape == (2, 5, 4)


# Keys.


def test_a_layer_of_another_class_leaves_its_neighbours_weights():
    one, _ = tl.Serial(tl.Dense(8), tl.Residual(tl.Dense(8))).init((X,), jax.random.key(0))
    two, _ = tl.Serial(tl.LayerNorm(), tl.Dense(8), tl.Residual(tl.LayerNorm(), tl.Dense(8))).init(
        (X,), jax.random.key(0)
    )
    for path, value in trees.flatten(one).items():
        assert (trees.get(two, path) == value).all()
    assert not (one['dense']['kernel'] == one['residual']['dense']['kernel']).any()


def test_keys_are_folded_by_position():
    net = tl.Branch(Noise(), tl.Serial(Noise()), Noise(), name='noises')
    made = run(net, jnp.zeros(3), rng=jax.random.key(3))

    def folded(*path):
        key = jax.random.key(3)
        for i in path:
            key = jax.random.fold_in(key, i)
        return jax.random.uniform(key, (3,))

    for got, path in zip(made, [(0,), (1, 0), (2,)], strict=True):
        assert (got == folded(*path)).all()


def test_without_a_key_none_is_made():
    assert run(tl.Serial(Plus(1), tl.Dropout(0.5)), 1) == (2,)


def test_nested_init_visits_each_layer_once():
    net: Layer = Seen()
    for _ in range(12):
        net = tl.Serial(net) if net.sublayers else tl.Branch(net)
        net = tl.Residual(net, name='around')
    Seen.calls.update(init=0, apply=0)
    net.init((X,), jax.random.key(0))
    assert Seen.calls == {'init': 1, 'apply': 1}


def test_arity_of_a_deep_nest_is_computed_once():
    net: Layer = tl.Serial(tl.Dup(), tl.Add())
    for i in range(60):
        net = tl.Residual(net) if i % 2 else tl.Serial(net)
    assert (net.n_in, net.n_out) == (1, 1)


# What errors say.


def test_a_stack_that_runs_short_names_the_layer_and_what_was_there():
    net = tl.Serial(tl.Dense(4), tl.Residual(tl.Serial(tl.Relu(), tl.Multiply(), name='gate')))
    with pytest.raises(TypeError) as e:
        net.init((X,), jax.random.key(0))
    assert str(e.value) == (
        'Multiply takes 2 values off the stack, only 1 was there: float32[2,5,4]'
    )
    assert our_notes(e.value) == [
        'in Serial.multiply: Multiply()(float32[2,5,4])',
        'in Residual.gate',
        'in Serial.residual',
    ]


def test_too_many_inputs_are_refused():
    with pytest.raises(TypeError, match=r'^Serial takes 1 value off the stack, 2 were there: fl'):
        tl.Serial(tl.Dense(4)).init((X, X), jax.random.key(0))
    with pytest.raises(TypeError, match=r'^Serial takes 1 value off the stack, only 0 were there$'):
        tl.Serial().init((), jax.random.key(0))
    with pytest.raises(TypeError, match='SelfAttention takes 2 values off the stack, only 1 was'):
        tl.SelfAttention(2, masked=True).init((X,), jax.random.key(0))


def test_notes_lead_to_the_layer():
    net = tl.Serial(tl.Residual(tl.Dense(512)))
    weights, _ = net.init((shape_dtype((2, 5, 512)),), jax.random.key(0))
    with pytest.raises(ValueError, match='8 wide and the weights were made for 512') as e:
        net.apply(weights, {}, (jnp.zeros((2, 5, 8)),))
    assert our_notes(e.value) == [
        'in Residual.dense: Dense(512)(float32[2,5,8])',
        'in Serial.residual',
    ]


def test_notes_describe_what_is_no_array():
    with pytest.raises(AttributeError) as e:
        tl.Serial(tl.Dense(4)).apply({'dense': {'kernel': X}}, {}, (None,))
    assert our_notes(e.value) == ['in Serial.dense: Dense(4)(NoneType)']


def test_outputs_that_do_not_match_n_out():
    with pytest.raises(
        TypeError, match='Liar promises n_out=2 and returned 1 value: set n_out'
    ) as e:
        tl.Serial(Liar()).init((X,), jax.random.key(0))
    assert our_notes(e.value) == ['in Serial.liar: Liar()(float32[2,5,8])']
    with pytest.raises(TypeError, match='Fn promises n_out=1 and returned 2 values'):
        tl.Fn('Pair', lambda x: (x, x)).output_signature(X)


def test_outputs_must_be_a_tuple():
    class Bare(Layer):
        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            return inputs[0], state

    with pytest.raises(TypeError, match=r'must return a tuple .* write return \(y,\), state'):
        tl.Serial(Bare()).init((X,), jax.random.key(0))


def test_what_is_no_layer_says_how_to_make_one():
    with pytest.raises(TypeError, match=r'Serial is made of layers, got Relu: call it, Relu\(…\)'):
        tl.Serial(tl.Relu)
    with pytest.raises(TypeError, match=r'got to_float32: wrap a function in Fn\(label, f\)'):
        tl.Parallel(to_float32)
    with pytest.raises(TypeError, match="Serial has no field 'units': there are name, layers"):
        tl.Serial().replace(units=3)


# Fn.


def test_fn_counts_required_parameters():
    assert tl.Fn('F', lambda x, y, z=1: x).n_in == 2
    assert tl.Fn('Add', jnp.add).n_in == 2
    assert run(tl.Fn('Both', lambda x, y: [y, x], n_out=2), 1, 2) == (2, 1)
    assert tl.Fn('Sum', lambda *xs: sum(xs), n_in=3).n_in == 3
    with pytest.raises(
        TypeError, match=r"Fn\('Sum'\): .* does not say .* \(\*args.*\): say .* n_in="
    ):
        tl.Fn('Sum', lambda *xs: sum(xs))
    with pytest.raises(
        TypeError, match=r"Fn\('Max'\): max does not say .* say how many with n_in="
    ):
        tl.Fn('Max', max)
    assert repr(tl.Fn('Max', max, n_in=2)) == "Fn('Max', max, n_in=2)"


def test_fn_shows_all_that_makes_it():
    assert repr(tl.Fn('Max', jnp.maximum, name='m')) == "Fn('Max', maximum, name='m')"
    assert repr(tl.Fn('Two', max, n_in=3, n_out=2)) == "Fn('Two', max, n_in=3, n_out=2)"


def test_a_tuple_of_one_layer_shows_its_comma():
    class Held(Layer):
        layers: tuple[Layer, ...] = ()

    assert repr(Held((tl.Relu(),))) == 'Held((Relu(),))'
    assert repr(Held((tl.Relu(), tl.Tanh()))) == 'Held((Relu(), Tanh()))'


def test_long_reprs_are_indented():
    net = tl.Serial(tl.Dense(512), tl.Residual(tl.LayerNorm(), tl.Dense(512)), tl.Dense(10))
    assert repr(tl.Serial(net, tl.Relu(), name='two')) == (
        'Serial(\n'
        '    Serial(Dense(512), Residual(LayerNorm(), Dense(512)), Dense(10)),\n'
        '    Relu(),\n'
        "    name='two',\n"
        ')'
    )


def test_a_subclass_without_fields_of_its_own_takes_layers_as_its_base_does():
    class Mine(tl.Serial):
        """In series, under another name."""

    assert Mine(tl.Dense(4), tl.Relu()).layers == (tl.Dense(4), tl.Relu())
    assert Mine(tl.Dense(4)).replace(name='x') == Mine(tl.Dense(4), name='x')
