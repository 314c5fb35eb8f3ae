"""Exports a trained model for other programs: weights as safetensors, decoding as a program.

The files run without this library and without the model's description: weights in a flat file,
and a decode step that `jax.export` has lowered for CPUs, GPUs and TPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

import layercomb_kernels
from layercomb import paths, trees
from layercomb.checks import Size, check_value
from layercomb.errors import UsageError, machine_errors, require
from layercomb.interop.safetensors import save_weights
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.model import Model, embeddings
from layercomb.shapes import shape_dtype
from layercomb.supervised.decoding.prompts import checked
from layercomb.supervised.decoding.prompts import max_len as longest
from layercomb.supervised.decoding.reading.ingesting import fresh_state, logits_of
from layercomb.transforms.unstacking import unstack, unstack_state
from layercomb.version import __version__

_MAX_LEN = 1024  # if nothing in the model limits it
# A key in the state that no path begins with: how many tokens each row has had, or room + 1 for a
# row whose logits are NaN from then on.
_READ = '/n_read'
_PLATFORMS = ('cpu', 'cuda', 'tpu')

_README = """\
# An exported model

* `model.safetensors`: the weights, each under its path in the model that was trained.
* `config.gin`: the configuration it was trained with.
{state}* `decode_init.bin`, `decode_step.bin`: programs of `jax.export`, for {platforms}.
  The first gives the state that decoding begins with. The second takes weights, state and the
  next tokens, int32 (B, 1), and gives logits (B, vocabulary) and the next state: B is
  {batch_size}, and the state has room for {room} positions. Logits are NaN for a row that has
  gone past them, or has had an id outside the vocabulary of {vocab_size}: look at them before a
  token is chosen. Weights and state are dicts from paths to arrays.
* `decode_step.json`: those paths, in the order the program takes them, with shapes and types. A
  weight of one layer among several alike is a slice of what `model.safetensors` has.

To continue tokens greedily, in this directory, with no more than jax, flatbuffers and safetensors:

```python
import json
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

def program(name):
    return export.deserialize(bytearray(Path(name).read_bytes())).call

def continued(prompt, n_tokens):
    room, vocab_size = layout['max_len'], layout['vocab_size']
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in 'iu' or n_tokens < 1:
        raise ValueError('give a prompt of at least one token id, and ask for at least one')
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f'the prompt has ids outside the vocabulary of {{vocab_size}}')
    if len(prompt) + n_tokens - 1 > room:
        raise ValueError(
            f'the caches hold {{room}} positions, and {{len(prompt)}} tokens with {{n_tokens}} new '
            'ones need more: ask for fewer, or export with a larger max_len'
        )
    state, made = start(), []
    for i in range(len(prompt) + n_tokens - 1):
        token = prompt[i] if i < len(prompt) else made[-1]
        logits, state = step(weights, state, np.full(({batch_size}, 1), token, np.int32))
        if i >= len(prompt) - 1:
            likely = np.asarray(logits[0], np.float32)
            if not np.isfinite(likely.max()):
                raise ValueError(f'the logits are NaN or infinite after position {{i}}')
            made.append(int(likely.argmax()))
    return made

arrays = load_file('model.safetensors')
layout = json.loads(Path('decode_step.json').read_text('utf-8'))
weights = {{w['path']: arrays[w['name']][tuple(w['index'])] for w in layout['weights']}}
start, step = program('decode_init.bin'), jax.jit(program('decode_step.bin'), donate_argnums=1)
```
"""


def write(
    model: Model,
    out: str | Path,
    config: str,
    *,
    batch_size: int = 1,
    max_len: int | None = None,
) -> dict[str, int]:
    """Writes a trained model into a directory, whole or not at all.

    Args:
      model: a language model with weights, (B, L) → (B, L, V).
      out: a directory that is empty or does not exist yet.
      config: the configuration that made the model, kept beside it.
      batch_size: how many rows the decode step takes.
      max_len: how many positions its caches hold; by default the model's limit, else 1,024.

    Returns:
      The size in bytes of each file written, by its name.

    Raises:
      TypeError: if a size is no int.
      ValueError: if one is below 1.
      UsageError: if the directory holds anything or cannot be written, or an extra is missing; and
        as for `decode_programs`.
    """
    require('flatbuffers', 'export')  # jax would ask for it as late as in serialize
    batch_size = check_value('export', 'batch_size', batch_size, Size)
    max_len = _room(model, max_len)
    path = paths.local(out, 'out')
    with machine_errors('choose another directory'):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f'{str(path)!r} is not empty: export to a new directory, or empty it')
        paths.check_can_hold(path)
    programs = decode_programs(model, batch_size, max_len)
    with machine_errors('free some space, or write elsewhere'), paths.whole(path) as folder:
        folder.mkdir()
        save_weights(folder / 'model.safetensors', model.weights or {})
        if jax.tree.leaves(model.state):
            save_weights(folder / 'state.safetensors', model.state)
        for name, program in programs.items():
            (folder / f'{name}.bin').write_bytes(program.serialize())
        (folder / 'config.gin').write_text(config, encoding='utf-8')
        layout = {'max_len': max_len, **_layout(model, programs['decode_step'])}
        (folder / 'decode_step.json').write_text(json.dumps(layout, indent=1), encoding='utf-8')
        (folder / 'README.md').write_text(_readme(model, layout), encoding='utf-8')
        return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def decode_programs(
    model: Model, batch_size: int = 1, max_len: int | None = None
) -> dict[str, jax.export.Exported]:
    """Decoding as programs that `jax.export` has lowered for CPUs, GPUs and TPUs.

    Args:
      model: a language model with weights.
      batch_size: the number of rows, B.
      max_len: how many positions the caches hold; by default the model's limit, else 1,024.

    Returns:
      ``decode_init``: () → state, and ``decode_step``: (weights, state, tokens (B, 1) int32) →
      (logits (B, V), state). Weights are unstacked; weights and state are flat dicts by path. A
      row's logits are NaN after it has gone past `max_len`, or has had an id outside the vocabulary
      (the smallest of the embeddings, or V without an embedding).

    Raises:
      UsageError: if it is not a language model, or `max_len` is more than the model's.
      TypeError: if a size is not an int.
      ValueError: if one is below 1.
    """
    batch_size = check_value('export', 'batch_size', batch_size, Size)
    layer, given, state = checked(model)
    if model.layer.n_in != 1:
        raise UsageError(f'export takes a language model: this one has {model.layer.n_in} inputs')
    room = _room(model, max_len)
    signature = shape_dtype((batch_size, room), 'int32')
    net, weights = unstack(layer, given)
    trained = unstack_state(layer, state)

    def fresh() -> Any:
        return fresh_state(net, trained, (signature,))

    def init() -> dict[str, Any]:
        return {**trees.flatten(fresh()), _READ: jnp.zeros(batch_size, jnp.int32)}

    def step(weights: Any, state: Any, tokens: jax.Array) -> Any:
        weights, state = trees.unflatten(weights), dict(state)
        read = state.pop(_READ)
        state = trees.typed(trees.unflatten(state), jax.eval_shape(fresh))
        outputs, state = net.apply(weights, state, (tokens,), mode=Mode.PREDICT)
        logits = logits_of(outputs)[:, 0]
        size = _vocab_size(net, logits.shape[-1])
        known = jnp.all((tokens >= 0) & (tokens < size), axis=1)
        read = jnp.where(known & (read < room), read + 1, room + 1)  # and so for good
        logits = jnp.where((read <= room)[:, None], logits, jnp.full_like(logits, jnp.nan))
        return logits, {**trees.flatten(state), _READ: read}

    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
    arguments = trees.flatten(weights), jax.eval_shape(init), tokens
    with layercomb_kernels.off(), _no_locations():  # what other machines lack, or need not know
        return {
            'decode_init': jax.export.export(jax.jit(init), platforms=_PLATFORMS)(),
            'decode_step': jax.export.export(jax.jit(step), platforms=_PLATFORMS)(*arguments),
        }


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Inside the context, programs are lowered without the source locations of operations."""
    option = 'jax_traceback_in_locations_limit'
    limit = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, limit)


def _room(model: Model, max_len: int | None) -> int:
    """How many positions the caches hold."""
    limit = longest(model.layer)
    room = check_value('export', 'max_len', max_len, Size | None) or limit or _MAX_LEN
    if limit is not None and room > limit:
        raise UsageError(f"max_len={room} is more than the model's {limit}: ask for fewer")
    return room


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Where a weight of the unstacked model is: an array's name, and indices along its first axes.

    It takes an array's place while weights are unstacked, and records how it is sliced.
    """

    name: str
    index: tuple[int, ...] = ()

    def __getitem__(self, i: int) -> _Slice:
        return _Slice(self.name, (*self.index, i))


def _layout(model: Model, step: jax.export.Exported) -> dict[str, Any]:
    """The inputs and outputs of the decode step, in types that JSON can hold."""
    whole = trees.map_with_path(lambda path, _: _Slice(path), model.weights or {})
    slices = trees.flatten(unstack(model.layer, whole)[1])
    (weights, state, tokens), _ = jax.tree.unflatten(step.in_tree, step.in_avals)
    logits, _ = jax.tree.unflatten(step.out_tree, step.out_avals)
    return {
        'made_by': f'layercomb {__version__}, jax {jax.__version__}',
        'platforms': list(step.platforms),
        'weights': [
            {'path': path, **_kind(x), **dataclasses.asdict(slices[path])}
            for path, x in weights.items()
        ],
        'state': [{'path': path, **_kind(x)} for path, x in state.items()],
        'tokens': _kind(tokens),
        'logits': _kind(logits),
        'vocab_size': _vocab_size(model.layer, logits.shape[-1]),
    }


def _vocab_size(net: Layer, n_logits: int) -> int:
    """The vocabulary size: that of the smallest embedding, else the number of logits."""
    return min((each.vocab_size for _, each in embeddings(net)), default=n_logits)


def _kind(x: Any) -> dict[str, Any]:
    return {'shape': list(x.shape), 'dtype': jnp.dtype(x.dtype).name}


def _readme(model: Model, layout: dict[str, Any]) -> str:
    state = '* `state.safetensors`: what it learnt beside weights, such as running statistics.\n'
    return _README.format(
        state=state if jax.tree.leaves(model.state) else '',
        platforms=', '.join(layout['platforms']),
        batch_size=layout['tokens']['shape'][0],
        room=layout['max_len'],
        vocab_size=layout['vocab_size'],
    )
