"""`lc.testing`: a broken layer for each promise, and what is said about it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import testing, tl
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import Decisions

X = lc.shape_dtype((2, 4, 8))


class Plain(Layer):
    """Gives what it gets; the base of all that is broken here."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, state


class Unequal(Plain):
    held: Any = 0

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


class Callable(Plain):
    def __call__(self, x):
        return x


class Settable(Plain):
    pass


Settable.__setattr__ = object.__setattr__  # in its body, dataclasses would refuse it


class PrintsFields(Plain):
    def __repr__(self):
        return 'PrintsFields(<some fields>)'


class Doubles(Plain):
    n: int = 1

    def __post_init__(self):
        object.__setattr__(self, 'n', 2 * self.n)
        super().__post_init__()


class Hides(Plain):
    inner: Layer = tl.Relu()


class Forgets(Plain):
    inner: Layer = tl.Relu()
    sublayers = property(lambda self: (self.inner,))

    def with_sublayers(self, sublayers):
        return self


class LooksAtValues(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.full(3, float(jax.random.normal(rng, (), jnp.float32)))}, {}


class KnowsTheMode(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.zeros(4 if mode is Mode.EVAL else 3, jnp.float32)}, {}


class StateOfMode(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'n': jnp.zeros((), jnp.float32)} if mode is Mode.TRAIN else {}


class WeightsInAList(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return [jnp.zeros(3, jnp.float32)], {}


class ListInside(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': {'parts': [jnp.zeros(3, jnp.float32)]}}, {}


class Slash(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'a/b': jnp.zeros(3, jnp.float32)}, {}


class Decides(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'/decisions': Decisions({'at': jnp.zeros(3, jnp.int32)})}


class Axes(Plain):
    weight_axes = {'kernel': 'D->F'}

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'kernel': jnp.zeros(3, jnp.float32)}, {}


class NoSuchWeight(Axes):
    weight_axes = {'table': 'V:D'}


class AList(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return [*inputs], state


class Alone(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs[0]


class TwoOutputs(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs * 2, state


class Announces(Plain):
    def output_signature(self, signature, mode=Mode.TRAIN):
        return (lc.shape_dtype((7,)),)


class Counts(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'n': jnp.zeros((), jnp.int32)}


class LosesState(Counts):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, {}


class WidensState(Counts):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, {'n': state['n'].astype(jnp.float32)}


class ChangesState(Counts):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        state['n'] = state['n'] + 1
        return inputs, state


class Stores(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        object.__setattr__(self, 'seen', 1)
        return inputs, state


class Assigns(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        self.seen = 1
        return inputs, state


class NumpyRandom(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x + np.random.normal(size=x.shape).astype(np.float32),), state


class Branches(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x if x.sum() > 0 else -x,), state


class KeyTwice(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        if not mode.is_training:
            return (x,), state
        a, b = (jax.random.normal(rng, x.shape, x.dtype) for _ in range(2))
        return (x + a * b,), state


class OwnKey(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        noise = jax.random.normal(jax.random.key(0), x.shape, x.dtype)
        return (x + noise if mode.is_training else x,), state


class DrawsAlways(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x + jax.random.normal(rng, x.shape, x.dtype),), state


class DrawsIfItCan(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x if rng is None else x + jax.random.normal(rng, x.shape, x.dtype),), state


class Recorded(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (2 * x if mode is Mode.RECORD else x,), state


class AsksForTracers(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x if isinstance(x, jax.core.Tracer) else 2 * x,), state


class Infinite(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (jnp.log(inputs[0]),), state


class Looks(Plain):
    """Sees all positions, and keeps nothing of them in PREDICT."""

    position_wise = False

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (jnp.cumsum(x, axis=1),), state


class Grows(Looks):
    """Its state becomes longer as it decodes."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        seen = jnp.zeros((x.shape[0], 0, x.shape[2]), jnp.float32)
        return {}, {'seen': seen} if mode is Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        if mode is not Mode.PREDICT:
            return (jnp.cumsum(x, axis=1),), state
        seen = jnp.concatenate([state['seen'], x], 1)
        return (jnp.cumsum(seen, axis=1)[:, -x.shape[1] :],), {'seen': seen}


class SaysPositionWise(Looks):
    position_wise = True


class WidensNarrow(Plain):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x.astype(jnp.float32) * 2,), state


class NarrowWeights(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.ones((), signature[0].dtype)}, {}


class Default(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.ones(3)}, {}


class NoGradient(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.zeros((), jnp.float32)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x + jnp.sqrt(weights['w'].astype(x.dtype)),), state


class OnePass(Plain):
    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'w': jnp.ones((), jnp.float32)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x * weights['w'].astype(x.dtype),), state


@tl.one_pass.register(OnePass)
def _(layer, weights, state, inputs, cts, *, rng, mode, state_cts):
    ((x,), (ct,)) = inputs, cts
    return (x * weights['w'],), (ct,), {'w': ct.sum()}


# The check that finds each, what came, and what mends it.
BROKEN = [
    (Unequal(), 'value', 'is another layer than the one it was made of', 'plain values'),
    (Callable(), 'value', 'it can be called', 'write apply, not __call__'),
    (Settable(), 'value', 'a field could be set', '__setattr__'),
    (PrintsFields(), 'printing', 'SyntaxError', 'whose repr is code'),
    (Doubles(2), 'printing|value', 'another', 'field|__post_init__'),
    (Hides(), 'rewriting', 'a rewrite did not reach', 'Combinator or Wrapper'),
    (Forgets(), 'rewriting', 'did not reach', 'Combinator or Wrapper'),
    (LooksAtValues(), 'init', 'ConcretizationTypeError', 'must not look at the values'),
    (KnowsTheMode(), 'init', r'in EVAL, at w there is float32\[4\] and not float32\[3\]', 'fields'),
    (StateOfMode(), 'init', 'in EVAL, of the state, at n there is nothing', 'Mode.PREDICT in init'),
    (WeightsInAList(), 'init', 'init returned a tuple of list, dict', "return {'kernel'"),
    (ListInside(), 'paths', 'at w/parts of the weights lies a list', 'a key of its own'),
    (Slash(), 'paths', "weights have the key 'a/b'", 'nest dicts'),
    (Decides(), 'paths', 'init makes decisions', 'leave them out of init'),
    (Axes(), 'axes', "'kernel' has 1 axes, and 'D->F' are declared", 'a letter for each axis'),
    (NoSuchWeight(), 'axes', "declared for table, and init made 'kernel'", 'path that init uses'),
    (AList(), 'outputs', 'apply returned list and dict', r'return \(y,\), state'),
    (Alone(), 'outputs', 'apply returned \\w*', r'return \(y,\), state'),
    (TwoOutputs(), 'outputs', r'2 outputs: float32\[2,4,8\], ', 'set n_out = 2'),
    (Announces(), 'outputs', r'output_signature says float32\[7\] in TRAIN', 'do not write'),
    (LosesState(), 'outputs', 'state after apply in TRAIN .* at n there is nothing', 'every entry'),
    (WidensState(), 'outputs', r'at n there is float32\[\] and not int32\[\]', 'in its dtype'),
    (ChangesState(), 'purity', 'changed the state in place', 'make a new dict'),
    (
        Stores(),
        'purity',
        "changed its own attribute 'seen' in place",
        'store nothing on self',
    ),
    (Assigns(), 'outputs', "FrozenInstanceError: cannot assign to field 'seen'", 'store nothing'),
    (NumpyRandom(), 'purity', 'made two programs', 'draw from rng, with jax.random'),
    (Branches(), 'outputs', 'TracerBoolConversionError', 'jax.lax.cond for if'),
    (KeyTwice(), 'keys', 'a key was used twice', r'jax.random.split\(rng\)'),
    (OwnKey(), 'modes', 'other outputs than EVAL, and the same ones for two keys', 'draw from rng'),
    (DrawsAlways(), 'modes', 'Error', 'draw only if mode.is_training'),
    (DrawsIfItCan(), 'modes', 'in EVAL another key gave other outputs', 'if mode.is_training'),
    (
        Recorded(),
        'modes',
        r'in RECORD, 0 float32\[2,4,8\] is off by up to',
        'ask for mode.is_train',
    ),
    (AsksForTracers(), 'jit', 'without jit, .* is off by up to', 'do not ask whether'),
    (Infinite(), 'jit', 'infinite or not a number', 'guard divisions'),
    (Looks(), 'decoding', 'output 0, given 2 slices of the positions: ', 'keep in the state'),
    (Grows(), 'decoding', r'at seen there is float32\[2,2,8\] and not', 'make caches in init'),
    (SaysPositionWise(), 'position_wise', 'given all positions but the first', 'not position-wise'),
    (WidensNarrow(), 'bfloat16', r'bfloat16 gave float32\[2,4,8\]', 'float32 = True'),
    (NarrowWeights(), 'bfloat16', r'of the weights, at w there is bfloat16\[\]', 'jnp.float32'),
    (Default(), 'float32', r'init made float64\[3\]', 'give a dtype'),
    (NoGradient(), 'gradients', r"the gradient of weights\['w'\] is not finite", 'epsilon'),
    (OnePass(), 'one_pass', 'of the gradients of weights, .*off by up to', 'leave the rule out'),
]
NEEDS = {SaysPositionWise: ('decoding',)}


@pytest.mark.parametrize(
    ('layer', 'name', 'came', 'fix'), BROKEN, ids=lambda x: type(x).__name__ * isinstance(x, Layer)
)
def test_says_what_is_broken_and_what_mends_it(layer, name, came, fix):
    with pytest.raises(AssertionError) as found:
        testing.check_layer(layer, X, skip=NEEDS.get(type(layer), ()))
    error = found.value
    assert isinstance(error, testing.LayerCheckError)
    assert re.fullmatch(name, error.check), error
    assert re.search(came, error.came), error
    assert re.search(fix, error.fix), error
    assert error.expected
    lines = str(error).splitlines()
    assert lines[0].startswith(type(layer).__name__) and repr(error.check) in lines[0]
    assert lines[1:] == [
        f'{error.promise}.',
        f'  came:     {error.came}',
        f'  expected: {error.expected}',
        f'  fix:      {error.fix}',
    ]


def test_every_check_finds_something():
    found = {check for _, names, *_ in BROKEN for check in names.split('|')}
    assert found == set(testing.checks())


def test_nothing_is_said_of_a_layer_that_keeps_its_promises():
    assert testing.check_layer(Plain(), X) is None
    assert testing.check_layer(Plain(), (X,), draws=False, skip=('decoding',)) is None


def test_one_broken_promise_hides_no_other():
    """A failure in one part leaves the others to be computed by themselves."""
    failed = set()
    for name, check in testing.layer_checks(Looks(), X):
        try:
            check()
        except testing.LayerCheckError:
            failed.add(name)
    assert failed == {'decoding'}


def test_checks_come_by_name_in_their_order_and_some_can_be_skipped():
    names = [name for name, _ in testing.layer_checks(Plain(), X, skip=('jit', 'keys'))]
    assert names == [name for name in testing.checks() if name not in ('jit', 'keys')]


def test_what_was_asked_wrongly_is_refused_at_once():
    with pytest.raises(TypeError, match=r'check_layer takes a layer, .* give Plain\(…\)'):
        testing.layer_checks(Plain, X)
    with pytest.raises(TypeError, match='Plain takes 1 value off the stack, 2 were there'):
        testing.layer_checks(Plain(), (X, X))
    with pytest.raises(ValueError, match=r"there is no check 'speed': choose of value, printing"):
        testing.layer_checks(Plain(), X, skip=('speed',))
    with pytest.raises(ValueError, match=r'positions=\(1, 1\) are 2 and there are 1 inputs'):
        testing.layer_checks(Plain(), X, positions=(1, 1))


@pytest.mark.parametrize(('draws', 'came'), [(True, 'the same outputs'), (False, 'other outputs')])
def test_draws_as_it_was_said(draws, came):
    layer = Plain() if draws else tl.Dropout(0.5)
    with pytest.raises(testing.LayerCheckError, match=f'training gives {came} for another key'):
        testing.check_layer(layer, X, draws=draws)


def test_example_inputs_are_valid():
    signature = (
        lc.shape_dtype((50, 3), bool),
        lc.shape_dtype((4, 100), 'int32'),
        lc.shape_dtype((4, 100), 'bfloat16'),
        lc.shape_dtype((), bool),
    )
    mask, ids, x, _ = testing.example_inputs(signature, 5)
    assert lc.signature_of((mask, ids, x)) == lc.signature_of(signature[:3])
    assert mask.any(-1).all() and not mask.all()
    assert set(np.unique(ids)) == {0, 1, 2, 3, 4}


def test_ids_are_below_the_smallest_vocabulary_inside():
    class Within(Plain):
        vocab_size: int = 3

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            (ids,) = inputs
            return (jnp.where(ids < self.vocab_size, 1.0, jnp.nan).astype(jnp.float32),), state

    signature = lc.shape_dtype((4, 100), 'int32')
    testing.check_layer(tl.Serial(Within(), tl.Relu()), signature)
    with pytest.raises(testing.LayerCheckError, match='infinite or not a number'):
        testing.check_layer(Within(), signature, vocab_size=5)


def test_inputs_without_positions_are_checked_without():
    testing.check_layer(tl.Dense(3), lc.shape_dtype((2, 8)), positions=())
    with pytest.raises(testing.LayerCheckError, match=r'positions=\(\)'):
        testing.check_layer(tl.Dense(3), lc.shape_dtype((2, 8)))


def test_needs_no_pytest():
    code = "import sys, layercomb as lc; lc.testing.checks(); assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)
