"""`transforms.remat`: the same model, blocks of which the backward pass computes again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl, transforms

SIZES = {'vocab_size': 16, 'd_model': 8, 'd_ff': 12, 'n_layers': 12, 'n_heads': 2, 'max_len': 32}
TOKENS = jnp.arange(32, dtype=jnp.int32).reshape(1, 32) % 16


def loss(net, weights):
    (logits,), _ = net.apply(weights, {}, (TOKENS,), mode=lc.Mode.TRAIN, rng=jax.random.key(1))
    return jnp.sum(jax.nn.log_softmax(logits)[..., 0])


def test_outputs_gradients_and_paths_stay():
    net = models.Llama(**SIZES, dropout=0.1)
    made = transforms.remat(net)
    weights, _ = net.init((TOKENS,), jax.random.key(0))
    again, _ = made.init((TOKENS,), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, weights, again)
    wanted, got = (jax.value_and_grad(lambda w, n=n: loss(n, w))(weights) for n in (net, made))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), wanted, got)


@pytest.mark.parametrize('adapted', [False, True])
def test_a_step_holds_less(optimized, adapted):
    net = models.Llama(**SIZES | {'d_ff': 256})
    weights, _ = net.init((TOKENS,), jax.random.key(0))
    if adapted:
        net, weights = transforms.lora(*transforms.quantize(net, weights, bits=8), 2)
    trainable, frozen = lc.trees.partition(weights, transforms.is_lora if adapted else None)

    def temporaries(net):
        grad = jax.grad(lambda some, rest: loss(net, lc.trees.merge(some, rest)))
        memory = jax.jit(grad).lower(trainable, frozen).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(transforms.remat(net)) < temporaries(net) / 2


def test_every_stack_once():
    net = models.T5(vocab_size=16, d_model=8, d_ff=12, n_heads=2, n_encoder_layers=2,
                    n_decoder_layers=2)  # fmt: skip
    made = transforms.remat(net)
    stacks = [x for _, x in lc.walk(made) if isinstance(x, tl.Repeat)]
    assert len(stacks) == 2 and all(isinstance(x.layer, tl.Remat) for x in stacks)
    assert transforms.remat(made) == made


def test_without_stacks_it_says_what_to_do():
    with pytest.raises(ValueError, match=r'remat: no blocks of this Serial are in a Repeat: build'):
        transforms.remat(tl.Serial(tl.Dense(8), tl.Remat(tl.Dense(8))))
    net = transforms.reversible(models.Llama(**SIZES))
    with pytest.raises(ValueError, match='are reversible, and keep nothing anyway: leave remat'):
        transforms.remat(net)
