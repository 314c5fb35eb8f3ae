"""The kernels for GPUs against the definition, by Triton's interpreter, and how they are chosen."""

from __future__ import annotations

import functools
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
    with pytest.warns(UserWarning, match=r'differ from it by 5.0e-01 .* for bfloat16 on a card'):
        assert not gpu.available('bfloat16', 64, 64)
    a_card.setattr(gpu, 'difference', lambda *_: float('nan'))
    with pytest.warns(UserWarning, match='differ from it by nan'):
        assert not gpu.available('float16', 64, 64)


def test_kernels_that_do_not_run_are_left_out_with_a_warning(a_card):
    def broken(*_):
        raise RuntimeError('no image for this device')

    a_card.setattr(gpu, 'difference', broken)
    with pytest.warns(UserWarning, match='do not run here: no image for this device'):
        assert not gpu.available('bfloat16', 64, 64)


def test_kernels_that_agree_are_taken(a_card):
    a_card.setattr(gpu, 'difference', lambda *_: 1e-5)
    assert gpu.available('float32', 64, 64)
    a_card.setattr(Device, 'compute_capability', '7.5')
    gpu.available.cache_clear()
    assert not gpu.available('float32', 64, 64)


def test_a_gpu_without_the_extra_is_told_of_it(a_card):
    a_card.setattr(gpu, 'is_installed', lambda: False)
    with pytest.warns(UserWarning, match=r"pip install 'layercomb\[gpu\]'"):
        assert not gpu.available('float32', 64, 64)


def test_the_check_runs_while_a_program_is_traced(monkeypatch):
    """It is the first call, inside of `jax.jit`, that asks for it; it differs by rounding."""
    monkeypatch.setattr(gpu, 'launch', interpreted.launch)
    found = []

    @jax.jit
    def program(x):
        with jax.ensure_compile_time_eval():
            found.append(gpu.difference('float16', 16, 16, 40))
        return x

    program(jnp.ones(3))
    assert 0 < found[0] < 2e-3


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from layercomb.layers.attention.selected.backends import gpu, ranges

dtype, length = sys.argv[1], gpu.TILE_LENS[{'bf16': 'bfloat16', 'fp32': 'float32'}[sys.argv[1]]]
sizes = dict.fromkeys('STQM', 4096) | {'R': 9, 'C': length, 'P': length, 'K': 64, 'D': 64}
sizes |= {'SCALE': 0.125, 'SOFTCAP': 2.0, 'ONCE': True}
kinds = dict.fromkeys('q k v d_out'.split(), '*' + dtype)
kinds |= dict.fromkeys('low high query key bounds place number first last'.split(), '*i32')
for name in ('forward', 'backward_queries', 'backward_keys'):
    kernel = getattr(ranges, name)
    said = {x: 'constexpr' if x in sizes else kinds.get(x, '*fp32') for x in kernel.arg_names}
    at = {(i,): sizes[x] for i, x in enumerate(kernel.arg_names) if x in sizes}
    even = {(i,): [['tt.divisibility', 16]] for i in range(len(said)) if (i,) not in at}
    for capability in map(int, sys.argv[2:]):
        source = ASTSource(kernel, said, at, even)
        target, options = GPUTarget('cuda', capability, 32), {'num_warps': gpu.N_WARPS}
        made = compile(source, target=target, options=options)
        assert 'mma' in made.asm['ptx'] and made.metadata.shared < 99 * 1024, made.metadata
"""


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
def test_kernels_compile_for_cards(dtype):
    """By Triton's own compiler and assembler, which need no card."""
    args = [sys.executable, '-c', COMPILE, dtype, '80', '90', '100']
    done = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
