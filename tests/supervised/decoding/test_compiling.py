"""Programs that are compiled before their first call are compiled once."""

from __future__ import annotations

import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models
from layercomb.supervised import decoding
from layercomb.supervised.decoding.compiling import compile_for
from layercomb.supervised.decoding.reading.ingesting import fresh_state


@pytest.fixture
def compiled(caplog):
    """Names of what was compiled since."""
    caplog.set_level(logging.DEBUG, logger='jax._src.dispatch')

    def names() -> list[str]:
        said = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return [s.split()[4] for s in said if s.startswith('Finished XLA compilation of')]

    return names


def tiny(vocab_size: int = 31, width: int = 16, n_layers: int = 2) -> lc.Model:
    net = models.GPT2(vocab_size, width, n_layers=n_layers, n_heads=2, max_len=128)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


def test_a_program_is_compiled_once_for_arguments_of_a_kind(compiled):
    program = jax.jit(lambda x: x * 2 + 1)
    for x in (jnp.ones(3), jnp.zeros(3)):
        compile_for(program, x)
        np.testing.assert_array_equal(program(x), x * 2 + 1)
    assert compiled().count('jit(<lambda>)') == 1
    compile_for(program, jnp.ones(4))
    assert compiled().count('jit(<lambda>)') == 1


def test_a_program_goes_when_nobody_else_has_it():
    program = jax.jit(lambda x: x + 1)
    compile_for(program, 1.0)
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize('n', [1, 5])
def test_a_stream_compiles_its_programs_once(compiled, n):
    model = tiny(40 + n, 16 + 2 * n, 14)  # which no other test has compiled
    first = [c.tolist() for c in decoding.stream(model, [[1, 2, 3]], n, temperature=0)]
    made = compiled()
    assert [made.count(f'jit({name})') for name in ('_drawn', 'steps')] == [1, int(n > 1)]
    assert made.count('jit(program)') == 3  # before the blocks, some of them, after them
    again = [c.tolist() for c in decoding.stream(model, [[1, 2, 3]], n, temperature=0)]
    assert first == again and not compiled()


def test_random_weights_are_no_part_of_a_fresh_state():
    net = lc.unstack(tiny().layer, {})[0]
    made = jax.make_jaxpr(lambda: fresh_state(net, {}, (lc.shape_dtype((1, 8), 'int32'),)))()
    assert 'broadcast' in str(made) and 'random' not in str(made)
