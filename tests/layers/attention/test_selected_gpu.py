"""The kernels for GPUs against the definition, by Triton's interpreter, and how they are chosen."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_selected import BASE, CASES, KINDS, arrays, counts, reference, simple

import layercomb_kernels
from layercomb.layers.attention.selected.backends import gpu
from layercomb.layers.attention.selected.function import selected_attention

pytest.importorskip('triton')


@pytest.fixture
def on_gpu(monkeypatch):
    """`selected_attention` takes the kernels of a GPU, interpreted."""
    monkeypatch.setattr(gpu, 'launch', interpreted.launch)
    monkeypatch.setattr(gpu, 'applies', lambda plan, *_: not plan.dropout_rate)
    monkeypatch.setattr(gpu, 'PLATFORM', jax.default_backend())
    jax.clear_caches()
    with layercomb_kernels.off():
        yield
    jax.clear_caches()


SLOW = [pytest.param(i, marks=pytest.mark.slow) for i in range(len(CASES)) if i not in (6, 9)]


@pytest.mark.parametrize('number', [6, 9, *SLOW])
def test_outputs_and_gradients_are_those_of_the_definition(on_gpu, number):
    case = BASE | CASES[number] | {'b': 1 + number % 2}
    duplicates = ('once', 'count')[number % 4 == 0]
    (q, k, v, bq, bk), further = arrays(KINDS[number % len(KINDS)], case, number)
    n = counts(np.asarray(bq), np.asarray(bk), case, **further)
    n = jnp.asarray(np.minimum(n, 1) if duplicates == 'once' else n)
    f = functools.partial(
        selected_attention, q_buckets=bq, k_buckets=bk, n_buckets=6, n_keys=case['n'],
        causal=case.get('causal', True), duplicates=duplicates, local_len=case['local_len'],
        n_sinks=case['n_sinks'], **further,
    )  # fmt: skip
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    got, pull = jax.vjp(f, q, k, v)
    wanted, pull_reference = jax.vjp(functools.partial(reference, n=n), q, k, v)
    for a, b in zip((got, *pull(d_out)), (wanted, *pull_reference(d_out)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_softcap_scale_and_depths(on_gpu):
    f, (q, k, v), _ = simple({'b': 1, 'r': 1}, softcap=2.0, scale=0.4)
    args = q, k, jnp.tile(v, (1, 1, 1, 2))
    grad = jax.value_and_grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))
    got = grad(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, 'applies', lambda *_: False)
        jax.clear_caches()
        wanted = grad(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_what_is_not_finite_stays_in_its_row(on_gpu):
    f, (q, k, v), _ = simple({'r': 1})
    spoilt = v.at[0].set(jnp.nan)
    assert jnp.isnan(f(q, k, spoilt)[0]).all()
    np.testing.assert_array_equal(f(q, k, spoilt)[1], f(q, k, v)[1])


def test_nan_of_an_early_round_stays(on_gpu):
    """Also where later rounds see nothing."""
    length = 40
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1, length, 16))
    k = k.at[0, 0, 0].set(jnp.nan)
    bq = jnp.zeros((1, 1, 2, length), jnp.int32)
    bk = bq.at[:, :, 1].set(1)
    y = selected_attention(q, k, v, bq, bk, n_buckets=2, n_keys=length, duplicates='count')
    assert jnp.isnan(y).all()


def test_under_vmap_it_is_computed_one_by_one(on_gpu):
    f, args, _ = simple({'b': 1, 'r': 1, 'length': 20})
    both = [jnp.stack([x, x[..., ::-1, :]]) for x in args]
    got = jax.vmap(f)(*both)
    for i in range(2):
        np.testing.assert_allclose(got[i], f(*(x[i] for x in both)), atol=1e-6)


def test_a_program_for_another_platform_has_tiles(on_gpu, monkeypatch):
    f, args, _ = simple({'b': 1, 'r': 1, 'length': 20})
    wanted = f(*args)
    monkeypatch.setattr(gpu, 'PLATFORM', 'cuda')
    monkeypatch.setattr(gpu, 'launch', lambda: lambda *_: [jnp.zeros(x.shape) for x in _[3]])
    jax.clear_caches()
    np.testing.assert_allclose(f(*args), wanted, atol=1e-6)


class Device:
    device_kind = 'a card'
    compute_capability = '9.0'


@pytest.fixture
def a_card(monkeypatch):
    """A machine that says it has a GPU of compute capability 9.0, with jax-triton."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'devices', lambda: [Device])
    monkeypatch.setattr(gpu, 'is_installed', lambda: True)
    gpu.available.cache_clear()
    yield monkeypatch
    gpu.available.cache_clear()


def test_kernels_that_differ_are_left_out_with_a_warning(a_card):
    a_card.setattr(gpu, 'difference', lambda *_: 0.5)
    with pytest.warns(
        UserWarning, match=r'on a card and for bfloat16 their results differ by 5.0e-01.*report'
    ):
        assert not gpu.available('bfloat16', 64, 64, False, True)
    a_card.setattr(gpu, 'difference', lambda *_: float('nan'))
    with pytest.warns(UserWarning, match='differ by nan'):
        assert not gpu.available('float16', 64, 64, False, True)


def test_kernels_that_do_not_run_are_left_out_with_a_warning(a_card):
    def broken(*_):
        raise RuntimeError('no image for this device')

    a_card.setattr(gpu, 'difference', broken)
    with pytest.warns(UserWarning, match=r'do not run here \(no image for this device\)'):
        assert not gpu.available('bfloat16', 64, 64, False, True)


def test_kernels_that_agree_are_taken(a_card):
    a_card.setattr(gpu, 'difference', lambda *_: 1e-5)
    assert gpu.available('float32', 64, 64, False, True)
    a_card.setattr(Device, 'compute_capability', '7.5')
    gpu.available.cache_clear()
    assert not gpu.available('float32', 64, 64, False, True)


def test_several_cards_are_told_of(a_card):
    a_card.setattr(jax, 'device_count', lambda: 2)
    with pytest.warns(UserWarning, match='JAX sees 2: set CUDA_VISIBLE_DEVICES=0'):
        assert not gpu.available('float32', 64, 64, False, True)


@pytest.mark.parametrize(
    ('change', 'applies'),
    [
        ({}, True),
        ({'depth': 48}, False),
        ({'depth_v': 256}, False),
        ({'depth_v': 16}, True),
        ({'dtype': 'float8_e4m3fn'}, False),
        ({'dtype_v': 'float16'}, False),
        ({'dropout_rate': 0.1}, False),
        ({'b': 0}, False),
        ({'b': 70_000}, False),
        ({'off': True}, False),
        ({'backend': 'tpu'}, False),
    ],
)
def test_what_the_kernels_take(monkeypatch, change, applies):
    case = {'depth': 64, 'depth_v': 64, 'dtype': 'bfloat16', 'b': 2, 'backend': 'gpu'} | change
    monkeypatch.setattr(jax, 'default_backend', lambda: case['backend'])
    monkeypatch.setattr(gpu, 'available', lambda *_: True)
    plan = gpu.Plan(
        length=8, n_heads=1, group=1, n_buckets=1, n_rounds=1, n_keys=1, local_len=0, n_sinks=0,
        causal=True, once=True, scale=1.0, softcap=None, tile_len=64, piece_len=64, together=8,
        dropout_rate=case.get('dropout_rate', 0.0),
    )  # fmt: skip
    shape, dtype = (case['b'], 1, 8), case['dtype']
    q = jax.ShapeDtypeStruct((*shape, case['depth']), dtype)
    v = jax.ShapeDtypeStruct((*shape, case['depth_v']), case.get('dtype_v', dtype))
    with layercomb_kernels.off() if case.get('off') else contextlib.nullcontext():
        assert gpu.applies(plan, q, q, v) is applies


def test_a_gpu_without_the_extra_is_told_of_it(a_card):
    a_card.setattr(gpu, 'is_installed', lambda: False)
    with pytest.warns(UserWarning, match=r"pip install 'layercomb\[gpu\]'"):
        assert not gpu.available('float32', 64, 64, False, True)


def test_the_check_runs_while_a_program_is_traced(monkeypatch):
    """It is the first call, inside of `jax.jit`, that asks for it; it differs by rounding."""
    monkeypatch.setattr(gpu, 'launch', interpreted.launch)
    found = []

    @jax.jit
    def program(x):
        with jax.ensure_compile_time_eval():
            found.append(gpu.difference('float16', 16, 16, True, True, 40))
        return x

    program(jnp.ones(3))
    assert 0 < found[0] < 2e-3


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layercomb.layers.attention.selected.backends import gpu, ranges

dtype, depth, plain = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'plain'
length = gpu.TILE_LENS[{'bf16': 'bfloat16', 'fp32': 'float32'}[dtype]]
sizes = {'R': 9, 'C': length, 'P': length, 'K': depth, 'D': depth}
sizes |= {'SCALE': 0.125, 'SOFTCAP': 0.0 if plain else 2.0, 'ONCE': not plain}
kinds = dict.fromkeys('q k v d_out'.split(), '*' + dtype)
kinds |= dict.fromkeys('STQM', 'i32')
kinds |= dict.fromkeys('low high query key bounds place number first last'.split(), '*i32')
for name in ('forward', 'backward_queries', 'backward_keys'):
    kernel = getattr(ranges, name)
    said = {x: 'constexpr' if x in sizes else kinds.get(x, '*fp32') for x in kernel.arg_names}
    at = {(i,): sizes[x] for i, x in enumerate(kernel.arg_names) if x in sizes}
    arrays = [i for i, x in enumerate(said) if x not in sizes and x not in 'STQM']
    even = {(i,): [['tt.divisibility', 16]] for i in arrays}
    for capability in map(int, sys.argv[4:]):
        source = ASTSource(kernel, said, at, even)
        target, options = GPUTarget('cuda', capability, 32), {'num_warps': gpu.N_WARPS}
        made = compile(source, target=target, options=options)
        room = 1024 * {86: 99, 90: 227, 100: 227}[capability]  # of a program's shared memory
        assert 'mma' in made.asm['ptx'] and made.metadata.shared <= room, made.metadata
"""


@pytest.mark.slow
@pytest.mark.parametrize('plain', ['plain', 'all'])
@pytest.mark.parametrize(('dtype', 'depth'), [('bf16', 64), ('bf16', 128), ('fp32', 64)])
def test_kernels_compile_for_cards(dtype, depth, plain):
    """By Triton's own compiler and assembler, which need no card."""
    args = [sys.executable, '-c', COMPILE, dtype, str(depth), plain, '86', '90', '100']
    env = {name: x for name, x in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(args, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
