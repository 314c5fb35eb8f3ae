"""The choice of blocks by native kernels: that of XLA, which sorts all products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb_kernels as kernels
from layercomb import tl
from layercomb.layers.attention.selected import choice
from layercomb.layers.attention.selected.backends import native

pytestmark = pytest.mark.skipif(not kernels.available(), reason='no kernels here')


def drawn(*shapes, seed=0):
    """Small integers: products with means of 2ⁿ of them are exact, and often equal."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in shapes]


def both(q, k, **options):
    """What the kernel chooses, and what XLA does."""
    with kernels.off():
        wanted = tl.chosen_blocks(q, k, **options)
    return np.array(tl.chosen_blocks(q, k, **options)), np.asarray(wanted)


# B, heads of queries and of keys, L, depth, block, chosen.
CASES = {
    'one of each': (1, 1, 1, 1, 1, 1, 1),
    'no whole block': (2, 1, 1, 3, 4, 8, 2),
    'shared heads': (2, 6, 2, 130, 16, 2, 5),
    'a head for all': (1, 3, 1, 67, 8, 4, 3),
    'odd depth': (1, 2, 2, 100, 7, 2, 4),
    'the length is no multiple': (2, 2, 1, 301, 16, 8, 3),
    'more than there are': (1, 2, 1, 50, 8, 4, 40),
    'many are cut often': (1, 2, 1, 1500, 8, 1, 30),
    'many chosen': (1, 1, 1, 1400, 8, 1, 700),
}
over_cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


@over_cases
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('masked', [False, True])
def test_the_kernel_chooses_as_xla_does(case, causal, masked):
    (b, h, g, length, depth, size, n), rng = case, np.random.default_rng(1)
    q, k = drawn((b, h, length, depth), (b, g, length, depth))
    mask = segments = None
    if masked:
        mask = jnp.asarray(rng.random((b, length)) < 0.8)
        segments = jnp.asarray(np.sort(rng.integers(3, 6, (b, length)), 1), jnp.int32)
    options = {'block_len': size, 'n_chosen': n, 'causal': causal}
    got, wanted = both(q, k, **options, mask=mask, segments=segments)
    assert got.shape == (b, h, n, length) and got.dtype == np.int32
    np.testing.assert_array_equal(got, wanted)


ORDERS = {
    'rising': np.arange(1000),
    'falling': -np.arange(1000),
    'equal': np.zeros(1000),
    'opposite': np.arange(1000) * np.where(np.arange(1000) % 2, 1, -1),
    'huge': 10.0 ** (np.arange(1000) % 60 - 30),
    'a few at the end': np.repeat([0, 1], [990, 10]),
    'steps': (np.arange(1000) + 4) // 100,  # the last one of 4
}


@pytest.mark.parametrize('n', [9, 30, 300])
@pytest.mark.parametrize('keys', ORDERS.values(), ids=ORDERS)
def test_the_order_of_products_does_not_matter(keys, n):
    q, k = jnp.ones((1, 1, 1000, 1)), jnp.asarray(keys, jnp.float32).reshape(1, 1, 1000, 1)
    np.testing.assert_array_equal(*both(q, k, block_len=1, n_chosen=n, causal=False))


@pytest.mark.parametrize('step', [1, 7, 500, 4000])
def test_many_of_many_equal_products(step):
    n_blocks, number = 4096, jnp.arange(4096, dtype=jnp.int32)[None]
    means = jnp.asarray(np.arange(n_blocks) // step, jnp.float32).reshape(1, 1, -1, 1)
    q, own = jnp.array([1.0, -1.0, 0.0]), jnp.array([[4000, 50, 700]], jnp.int32)
    blocks = choice.Blocks(means, jnp.zeros_like(number), number)

    def best():
        ids = jnp.zeros_like(own)
        return choice.best_blocks(q[None, None, :, None], blocks, ids, own, 300, False, n_blocks)

    with kernels.off():
        wanted = best()
    np.testing.assert_array_equal(best(), wanted)


def test_equal_products_are_not_lost_where_greater_ones_follow():
    k = jnp.zeros((1, 1, 400, 1)).at[:, :, 300:].set(1)
    got, wanted = both(jnp.ones_like(k), k, block_len=1, n_chosen=4)
    np.testing.assert_array_equal(got, wanted)
    assert got[0, 0, :, 303].tolist() == [300, 301, 302, 0]


@pytest.mark.parametrize(('n_less', 'n_more'), [(30, 10), (300, 100)])
def test_zeros_of_both_signs_are_equal(n_less, n_more):
    n = n_less + n_more
    k = jnp.asarray(np.repeat([-1e-30, 0], [n_less, n_more]), jnp.float32).reshape(1, 1, n, 1)
    q = jnp.full((1, 1, n, 1), 1e-30)  # some products are −10⁻⁶⁰, which is −0
    got, wanted = both(q, k, block_len=1, n_chosen=4, causal=False)
    np.testing.assert_array_equal(got, wanted)
    assert got[0, 0, :, -1].tolist() == [0, 1, 2, 3]


def test_products_are_the_greatest_where_they_are_rounded():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 2, 500, 64))
    got, wanted = both(q, k, block_len=2, n_chosen=8)
    means = np.asarray(k, np.float64).reshape(1, 2, 250, 2, 64).mean(3)
    products = np.pad(np.asarray(q, np.float64) @ means.swapaxes(2, 3), [(0, 0)] * 3 + [(0, 1)])
    got, wanted = (np.take_along_axis(products.swapaxes(2, 3), x, 2) for x in (got, wanted))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize('n_queries', [1, 5, 130])
def test_queries_do_not_depend_on_each_other(n_queries):
    """So that a position that is decoded chooses from the same means as the whole sequence."""
    q, means = jax.random.normal(jax.random.key(0), (2, 2, 3, 200, 64))
    document, ids = jnp.zeros((2, 200), jnp.int32), jnp.zeros((2, 200), jnp.int32)
    own = jnp.broadcast_to(jnp.arange(200, dtype=jnp.int32)[None], (2, 200))

    def best(q, ids, own):
        return kernels.best_blocks(q, means, document, ids, own, 5, True, -1)

    some = slice(70, 70 + n_queries)
    got = best(q[:, :, some], ids[:, some], own[:, some])
    np.testing.assert_array_equal(got, best(q, ids, own)[..., some])


def test_what_is_not_a_number_stays_where_it_is():
    q, k = drawn((2, 2, 300, 8), (2, 2, 300, 8))
    clean, _ = both(q, k, block_len=2, n_chosen=4)
    got, wanted = both(q.at[0, 0, 250].set(jnp.nan), k, block_len=2, n_chosen=4)
    np.testing.assert_array_equal(got, wanted)
    assert (got[0, 0, :, 250] == 150).all()  # it chooses nothing
    got[0, 0, :, 250] = clean[0, 0, :, 250]
    np.testing.assert_array_equal(got, clean)
    got, wanted = both(q, k.at[0, 1, 100].set(jnp.nan), block_len=2, n_chosen=4)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(got[1], clean[1])
    assert not (got[0, 1] == 50).any()
    for nothing in both(jnp.full_like(q, jnp.nan), k, block_len=2, n_chosen=4):
        assert (nothing == 150).all()


def test_numbers_that_do_not_fit_harm_nothing():
    q, means = drawn((1, 2, 3, 8), (1, 1, 4, 8))
    document = jnp.array([[2, 0, -1, 1]], jnp.int32)
    ids = jnp.array([[0, -5, 2**31 - 1]], jnp.int32)
    own = jnp.array([[2**31 - 1, -(2**31), 7]], jnp.int32)
    for causal in (True, False):
        y = kernels.best_blocks(q, means, document, ids, own, 6, causal, 99)
        assert ((y == 99) | ((y >= 0) & (y < 4))).all()


def test_the_kernel_is_used_where_it_applies():
    q, k = drawn((1, 2, 40, 8), (1, 1, 40, 8))
    choose = jax.jit(lambda q, k: tl.chosen_blocks(q, k, block_len=2, n_chosen=3))
    assert 'layercomb_best_blocks' in choose.lower(q, k).as_text()
    means = k[:, :, ::2]
    assert native.chooses(q, means)
    assert not native.chooses(q.astype(jnp.bfloat16), means)
    with kernels.off():
        assert not native.chooses(q, means)
        assert 'layercomb' not in choose.lower(q, k).as_text()


def test_no_gradient_goes_through_it():
    q, k = drawn((1, 2, 40, 8), (1, 1, 40, 8))

    def loss(q, k):
        blocks = tl.chosen_blocks(q, k, block_len=2, n_chosen=3)
        return (q * blocks.sum(2)[..., None].astype(jnp.float32)).sum()

    _, d_k = jax.jit(jax.grad(loss, (0, 1)))(q, k)
    assert not d_k.any()


def test_mapped_it_is_the_same():
    q, k = drawn((3, 1, 2, 40, 8), (3, 1, 1, 40, 8))

    def choose(q, k):
        return tl.chosen_blocks(q, k, block_len=2, n_chosen=3)

    wanted = jnp.stack([choose(*row) for row in zip(q, k, strict=True)])
    np.testing.assert_array_equal(jax.vmap(choose)(q, k), wanted)


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    q, means = drawn((1, 2, 3, 8), (1, 1, 4, 8))
    document, at = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    for wrong in (means[:, :, :, :4], means[:, :0]):
        with pytest.raises(ValueError, match='the shapes do not fit together'):
            kernels.best_blocks(q, wrong, document, at, at, 2, True, -1)
    with pytest.raises(ValueError, match='the shapes do not fit together'):
        kernels.best_blocks(q, means, at, at, at, 2, True, -1)
    with pytest.raises(TypeError, match='expected int32, got float32'):
        kernels.best_blocks(q, means, document.astype(jnp.float32), at, at, 2, True, -1)
    with pytest.raises(TypeError, match='the kernels take float32, got bfloat16'):
        kernels.best_blocks(q.astype(jnp.bfloat16), means, document, at, at, 2, True, -1)
