"""Rotary positions: scalings beside recorded frequencies, partial rotation, layouts, decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, shape_dtype, tl
from layercomb.layers.core.mode import Mode

SHORT = (1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8)
LONG = (1.5, 2.0, 3.0, 4.5, 6.5, 9.0, 12.0, 15.5)
LONGROPE = tl.LongRopeScaling(SHORT, LONG, 64, 4.0)

# Made with transformers 5: ROPE_INIT_FUNCTIONS[type](config, 'cpu', seq_len=length), for heads of
# 16 features: the scaling, the period, the length, the frequencies and the attention factor.
RECORDED = {
    'linear': (
        tl.LinearScaling(4.0),
        1e4,
        9,
        '0.25 0.07905694 0.025 0.007905695 0.0025 0.0007905695 0.00025 7.905695e-05',
        1.0,
    ),
    'dynamic, short': (
        tl.DynamicScaling(2.0, 64),
        1e4,
        48,
        '1.0 0.3162278 0.1 0.03162278 0.01 0.003162278 0.001 0.0003162278',
        1.0,
    ),
    'dynamic, long': (
        tl.DynamicScaling(2.0, 64),
        1e4,
        200,
        '1.0 0.2495285 0.06226445 0.01553675 0.003876863 0.0009673875 0.0002413907 6.023386e-05',
        1.0,
    ),
    'llama3': (
        tl.Llama3Scaling(32.0, 1.0, 4.0, 8192),
        5e5,
        9,
        '1.0 0.1939228 0.03760603 0.007292665 0.0004295567 8.570256e-06 1.661967e-06 3.222933e-07',
        1.0,
    ),
    'yarn': (
        tl.YarnScaling(4.0, 2048),
        1e4,
        9,
        '1.0 0.3162278 0.1 0.02569351 0.00625 0.001383497 0.00025 7.905695e-05',
        1.13862944,
    ),
    'yarn, all said': (
        tl.YarnScaling(40.0, 4096, 24.0, 2.0, mscale=1.0, mscale_all_dim=0.707, truncate=False),
        1e4,
        9,
        '1.0 0.3162278 0.1 0.02973627 0.004886119 0.0001166265 2.5e-05 7.905694e-06',
        1.0857264,
    ),
    'longrope, short': (
        LONGROPE,
        1e4,
        48,
        '1.0 0.2874798 0.07692308 0.01976424 0.005 0.001264911 0.0003225807 8.321784e-05',
        1.15470054,
    ),
    'longrope, long': (
        LONGROPE,
        1e4,
        200,
        '.6666667 .1581139 .03333334 .007027284 .001538462 3.513642e-4 8.333333e-5 2.040179e-5',
        1.15470054,
    ),
}


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def turned(layer, q, k=None):
    return np.asarray(layer.apply({}, {}, (q, q if k is None else k))[0][0])


def slow(x, speed, magnitude=1.0, layout='halves'):
    """x (B, H, L, K), a pair of features at a time; those without a frequency stay."""
    y, n = np.array(x), len(speed)
    for t, i in np.ndindex(x.shape[2], n):
        one, two = (i, i + n) if layout == 'halves' else (2 * i, 2 * i + 1)
        sin, cos = np.sin(t * speed[i]) * magnitude, np.cos(t * speed[i]) * magnitude
        y[:, :, t, one] = x[:, :, t, one] * cos - x[:, :, t, two] * sin
        y[:, :, t, two] = x[:, :, t, two] * cos + x[:, :, t, one] * sin
    return y


@pytest.mark.parametrize('case', RECORDED.values(), ids=list(RECORDED))
def test_scalings_are_those_of_transformers(case):
    scaling, period, length, recorded, magnitude = case
    speed = [float(x) for x in recorded.split()]
    np.testing.assert_allclose(scaling.frequencies(16, period, length), speed, rtol=2e-6)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-7)
    x = values(1, 1, length, 16)
    wanted = slow(x, scaling.frequencies(16, period, length), magnitude)
    np.testing.assert_allclose(
        turned(tl.RotaryPositions(period, scaling=scaling), x), wanted, atol=3e-5
    )


def test_magnitude_of_yarn_may_be_given():
    assert tl.YarnScaling(4.0, 2048, attention_factor=1.5).magnitude == 1.5
    assert tl.YarnScaling(1.0, 2048).magnitude == 1
    assert tl.YarnScaling(4.0, 2048, mscale=0.7, mscale_all_dim=0.7).magnitude == 1


@pytest.mark.parametrize('layout', ['halves', 'pairs'])
@pytest.mark.parametrize('share, n', [(1.0, 12), (0.5, 6), (0.4, 4)])
def test_share_and_layout(share, n, layout):
    x = values(2, 3, 5, 12)
    speed = 100.0 ** (-np.arange(0, n, 2) / n)
    got = turned(tl.RotaryPositions(100.0, share=share, layout=layout), x)
    np.testing.assert_allclose(got, slow(x, speed, layout=layout), atol=1e-5)
    np.testing.assert_array_equal(got[..., n:], x[..., n:])


def test_what_does_not_turn_is_not_multiplied():
    scaling = tl.YarnScaling(4.0, 16)
    x = values(1, 1, 3, 8)
    got = turned(tl.RotaryPositions(scaling=scaling, share=0.5), x)
    wanted = slow(x, scaling.frequencies(4, 1e4, 3), scaling.magnitude)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize('n_prompt', [1, 3, 7])
@pytest.mark.parametrize(
    'scaling',
    [
        tl.DynamicScaling(2.0, 4),
        tl.LongRopeScaling(SHORT[:3], LONG[:3], 4, 2.0),
        tl.LinearScaling(2.0),
    ],
)
def test_decoding_gives_what_the_whole_sequence_gives(scaling, n_prompt):
    """Also past the trained length: the state was made for 7 positions."""
    layer = tl.RotaryPositions(max_len=9, scaling=scaling)
    q, k = values(2, 2, 7, 6), values(2, 1, 7, 6, seed=1)
    (wanted, _), _ = layer.apply({}, {}, (q, k))
    state = init_state(layer, (shape_dtype(q.shape), shape_dtype(k.shape)), Mode.PREDICT)
    assert ('frequencies' in state) == scaling.by_length
    for first, last in [(0, n_prompt), *((t, t + 1) for t in range(n_prompt, 7))]:
        piece = q[:, :, first:last], k[:, :, first:last]
        (got, _), state = layer.apply({}, state, piece, mode=Mode.PREDICT)
        np.testing.assert_array_equal(got, wanted[:, :, first:last])
    moved = tl.seek(state, jnp.array([3, 5]))
    (got, _), _ = layer.apply({}, moved, (q[:, :, 3:4], k[:, :, 3:4]), mode=Mode.PREDICT)
    np.testing.assert_array_equal(got[0], wanted[0, :, 3:4])


def test_gradients_turn_back():
    """A rotation's transpose is its inverse."""
    layer = tl.RotaryPositions(100.0, share=0.5, layout='pairs')
    x = jnp.asarray(values(1, 2, 5, 8))
    y, pull = jax.vjp(lambda x: layer.apply({}, {}, (x, x))[0][0], x)
    np.testing.assert_allclose(pull(y)[0], x, atol=1e-5)


def test_descriptions():
    assert repr(tl.RotaryPositions()) == 'RotaryPositions()'
    layer = tl.RotaryPositions(5e5, 32, scaling=LONGROPE, share=0.5, layout='pairs')
    assert eval(repr(layer), vars(tl)) == layer
    assert tl.LongRopeScaling(list(SHORT), list(LONG), 64, 4) == LONGROPE
    assert hash(layer) == hash(layer.replace(share=0.5))


@pytest.mark.parametrize(
    'make, error, words',
    [
        (lambda: tl.LinearScaling(0.0), ValueError, 'LinearScaling: factor must be above 0'),
        (lambda: tl.DynamicScaling(2.0, 1.5), TypeError, 'DynamicScaling: max_len must be an int'),
        (
            lambda: tl.Llama3Scaling(8.0, 4.0, 1.0, 8192),
            ValueError,
            r'high_freq_factor=1.0 must be more than low_freq_factor=4.0',
        ),
        (
            lambda: tl.LongRopeScaling((1.0,), (1.0, 2.0), 64, 2.0),
            ValueError,
            '1 short_factors and 2 long_factors: give one each for every pair',
        ),
        (lambda: tl.RotaryPositions(share=0.0), ValueError, 'share must be above 0 and at most 1'),
        (lambda: tl.RotaryPositions(layout='odd'), TypeError, "'halves' or 'pairs', got 'odd'"),
        (
            lambda: tl.RotaryPositions(scaling='linear'),
            TypeError,
            'scaling must be a RotaryScaling or None',
        ),
        (
            lambda: turned(tl.RotaryPositions(share=0.3), values(1, 1, 2, 12)),
            ValueError,
            r'share=0.3 of 12 features is 3: it must be an even number, 2 at least',
        ),
        (
            lambda: turned(tl.RotaryPositions(scaling=LONGROPE), values(1, 1, 2, 12)),
            ValueError,
            'LongRopeScaling has 8 factors for 6 pairs of features: give one for each pair',
        ),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()
