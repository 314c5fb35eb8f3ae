"""The gradient of a convolution, which the CPU takes by a way of its own, against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.basic import convolution

ONE_AXIS = [
    tl.Conv1D(4),
    tl.Conv1D(4, width=4, stride=2),
    tl.Conv1D(4, stride=3, padding='valid'),
    tl.Conv1D(4, width=1, stride=2),
    tl.Conv1D(4, padding='causal', dilation=2),
    tl.Conv1D(4, stride=2, padding='causal', groups=2),
    tl.Conv1D(8, padding='valid', dilation=3, groups=4),
]
TWO_AXES = [
    tl.Conv2D(4),
    tl.Conv2D(4, strides=(2, 2)),
    tl.Conv2D(4, kernel_size=(2, 5), strides=(3, 1)),
    tl.Conv2D(6, kernel_size=(1, 4), strides=(2, 3), padding='valid', groups=2),
    tl.Conv2D(8, groups=4),
]
CASES = [(layer, (3, 11, 4), 'float32') for layer in ONE_AXIS]
CASES += [(layer, (2, 9, 12, 4), 'float32') for layer in TWO_AXES]
CASES += [(ONE_AXIS[5], (3, 11, 4), 'bfloat16'), (TWO_AXES[1], (2, 9, 12, 4), 'bfloat16')]


def gradients(layer, x, backend, monkeypatch):
    """Those of the weights and of x, as they are taken on a backend."""
    weights, _ = layer.init((jax.ShapeDtypeStruct(x.shape, x.dtype),), jax.random.key(0))
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)

    def loss(weights, x):
        (y,), _ = layer.apply(weights, {}, (x,))
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    with monkeypatch.context() as patch:
        patch.setattr(convolution.jax, 'default_backend', lambda: backend)
        return jax.jit(jax.grad(loss, (0, 1)))(weights, x)


@pytest.mark.parametrize(('layer', 'shape', 'dtype'), CASES, ids=repr)
def test_the_gradient_is_that_of_xla(layer, shape, dtype, monkeypatch):
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    ours, theirs = (gradients(layer, x, name, monkeypatch) for name in ('cpu', 'gpu'))
    rtol = 1e-5 if dtype == 'float32' else 2e-2

    def compare(a, b):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    jax.tree.map(compare, ours, theirs)


@pytest.mark.parametrize(
    ('layer', 'shape', 'text'),
    [
        (tl.MaxPool((8, 2)), (1, 4, 4, 3), 'MaxPool: a window of 8 × 2 does not fit into 4 × 4: '),
        (tl.Conv1D(4, 3, padding='valid', dilation=2), (1, 4, 4), 'Conv1D: a window of 5 does not'),
        (tl.Conv2D(4, (5, 1), padding='valid'), (1, 4, 4, 3), "a smaller one, or padding='same'"),
    ],
)
def test_a_window_larger_than_the_input_is_refused(layer, shape, text):
    with pytest.raises(ValueError, match=text):
        layer.output_signature(jax.ShapeDtypeStruct(shape, jnp.float32))
    padded = layer.replace(padding='same')
    assert padded.output_signature(jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize('layer', [tl.Conv1D(4), tl.Conv2D(4), tl.MaxPool(), tl.AvgPool()])
def test_convolutions_and_pools_take_floats(layer):
    shape = (1, 4, 3) if isinstance(layer, tl.Conv1D) else (1, 4, 4, 3)
    with pytest.raises(TypeError, match=f'{type(layer).__name__} takes floating-point vectors'):
        layer.output_signature(jax.ShapeDtypeStruct(shape, jnp.int32))


def test_a_gradient_in_a_scan_needs_no_plain_loops(optimized):
    """Every convolution is one that the fast routine takes: batch first and channels last."""
    layer = tl.Conv2D(4, strides=(1, 1))
    kernels = jnp.ones((3, 3, 3, 4, 4))

    def loss(kernels, x):
        def body(x, kernel):
            return layer.apply({'kernel': kernel, 'bias': jnp.ones(4)}, {}, (x,))[0][0], None

        return jax.lax.scan(body, x, kernels)[0].sum()

    text = (
        jax.jit(jax.grad(loss, (0, 1))).lower(kernels, jnp.ones((2, 6, 6, 4))).compile().as_text()
    )
    found = [line for line in text.splitlines() if 'dim_labels=' in line]
    assert len(found) == 3 and all('dim_labels=b01f_01io->b01f' in line for line in found)


def test_it_can_be_differentiated_twice():
    x = jax.random.normal(jax.random.key(1), (1, 5, 2))
    kernel = jax.random.normal(jax.random.key(2), (3, 2, 2))

    def slope(direction, kernel):
        def loss(x):
            return jnp.sum(convolution.convolve(x, kernel, (2,), 'SAME', (1,), 1) ** 2)

        return jnp.vdot(jax.grad(loss)(x), direction)

    hessian = jax.grad(lambda k: slope(x, k))(kernel)  # ⟨x, ∇ₓ⟩ is twice the loss, for it is square
    loss = jax.grad(lambda k: jnp.sum(convolution.convolve(x, k, (2,), 'SAME', (1,), 1) ** 2))
    np.testing.assert_allclose(hessian, 2 * loss(kernel), rtol=1e-5)
