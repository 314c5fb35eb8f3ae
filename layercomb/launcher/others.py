"""Models of other libraries, in the place of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from layercomb import transforms, trees
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError, usage_errors
from layercomb.interop.tensors import shapes_of
from layercomb.interop.tokenizer import PretrainedTokenizer
from layercomb.interop.weight_cache import described, look, weights_of
from layercomb.launcher import calibration, sources
from layercomb.layers.core.layer import Layer
from layercomb.layers.decoding.narrow import CacheBits
from layercomb.layers.metrics.class_names import class_names
from layercomb.model import Model
from layercomb.shapes import Signature, shape_dtype
from layercomb.trees import Tree

KV_CACHES: dict[str, CacheBits] = {'bfloat16': 16, 'int8': 8}  # the bits of what --kv_cache names


def loaded(
    source: sources.Source,
    bits: int | None = None,
    calibrate: str | None = None,
    cache: Path | None = None,
) -> tuple[Model, Any]:
    """A model of another library, and its tokenizer if it has one.

    Args:
      source: of a kind other than a run or a configuration.
      bits: 16, 8 or 4 narrows the weights; None leaves them as they come.
      calibrate: a text to round them for; what is made so is not kept.
      cache: a folder for weights that later commands map; None for none.

    Raises:
      UsageError: if it cannot be loaded, or not be calibrated.
    """
    from layercomb import interop

    keeps = source.kind != sources.TRAX and cache is not None
    options: dict[str, Any] = {'cache': cache} if keeps else {}
    with usage_errors():
        if bits == 16 and source.kind == sources.HUGGING_FACE:  # without a wide copy
            return interop.load(source.path, dtype='bfloat16', **options)
        # Narrow weights cannot be narrowed again, so they are read as wide ones; Trax's are wide.
        if bits is not None and source.kind != sources.TRAX:
            if cache is not None and calibrate is None:
                return _narrowed_once(source.path, bits, cache)
            options = {'dtype': 'float32'}
        model, tokenizer = interop.load(source.path, **options)
        return narrowed(model, bits, calibrate, tokenizer), tokenizer


def _narrowed_once(path: Path, bits: int, cache: Path) -> tuple[Model, Any]:
    """As `loaded`, with narrow weights that are kept: the wide ones are read the first time."""
    from layercomb import interop
    from layercomb.interop import descriptions

    seen = look(cache, path)  # before anything is read: files may be replaced
    net, tokenizer = descriptions.of(path)
    layers: list[Layer] = []

    def abstract(weights: Tree) -> Tree:
        made = narrowed(Model(net, weights), bits)
        layers.append(made.layer)
        return made.weights or {}

    def make() -> dict[str, Any]:
        nonlocal tokenizer
        wide, tokenizer = interop.load(path, dtype='float32')
        made = narrowed(wide, bits)
        layers.append(made.layer)  # of the same files as the weights
        return dict(trees.flatten(made.weights or {}))

    shapes = jax.eval_shape(abstract, shapes_of(net, interop.signature(Model(net))))
    options = {'reader': 'narrowed', **_rounding(bits)}
    weights = weights_of(cache, seen, options, described(shapes), make)
    return Model(layers[-1], trees.unflatten(weights)), tokenizer


def _rounding(bits: int) -> dict[str, Any]:
    """All options of `transforms.quantize` that say what weights become."""
    group_size = 32 if bits == 4 else 64  # 4 bits lose much less in small groups
    return {'bits': bits, 'group_size': group_size, 'smallest': 4096, 'activation_bits': 16}


def check_no_run(source: sources.Source, bindings: Sequence[str], checkpoint: str = 'last') -> None:
    """Refuses options that are about runs, for a model that is none."""
    if bindings or checkpoint != 'last':
        option = '--gin_param' if bindings else '--checkpoint'
        raise UsageError(f'{source.name!r} is no run, so {option} means nothing: leave it out')


def signature_of(model: Model) -> Signature:
    """The signature of a model of another library, also of one that is of no family."""
    from layercomb import interop

    try:
        return interop.signature(model)
    except UsageError:
        return signature_of_text(model.layer)


def narrowed(
    model: Model, bits: int | None, calibrate: str | None = None, tokenizer: Any = None
) -> Model:
    """The model with narrow weights.

    Args:
      model: with wide weights.
      bits: 16, 8 or 4; None leaves them.
      calibrate: a text to round them for; None rounds to the nearest.
      tokenizer: of the text.

    Raises:
      UsageError: for a text without a tokenizer; as of `calibration.narrowed`.
    """
    if bits is None:
        return model
    options = _rounding(bits)
    if calibrate is not None:
        if tokenizer is None:
            raise UsageError('--calibrate reads a text, and the model has no tokenizer for it')
        return calibration.narrowed(model, bits, options['group_size'], calibrate, tokenizer)
    made = transforms.quantize(model.layer, model.weights or {}, **options)
    return Model(*made, model.state)


def with_kv_cache(model: Model, kind: str | None) -> Model:
    """The model with narrow decoding caches.

    Args:
      model: a language model.
      kind: one of `KV_CACHES`; None leaves them.

    Raises:
      UsageError: if it has none that can be narrow.
    """
    if kind is None:
        return model
    try:
        net = transforms.narrow_caches(model.layer, KV_CACHES[kind])
    except ValueError:
        raise UsageError(
            '--kv_cache is for models that keep keys and values of a text, and this one keeps none '
            'that can be narrow: leave it out'
        ) from None
    return Model(net, model.weights, model.state)


def checked_tokenizer(tokenizer: Any, must_decode: bool) -> Any:
    """A run's tokenizer: one of a pretrained model as it is, with what it knows; others adapted.

    Args:
      tokenizer: None for none.
      must_decode: whether it has to make text.
    """
    if tokenizer is None:
        return None
    with usage_errors():
        made = adapted(tokenizer, 'train', must_decode=must_decode)
    return tokenizer if isinstance(tokenizer, PretrainedTokenizer) else made


def signature_of_text(net: Layer) -> Signature:
    """The signature of a short text: tokens, for an encoder-decoder source and mask.

    A classifier of texts has a mask after its tokens.
    """
    from layercomb.supervised.decoding import prompts

    length, of_source = (min(8, f(net) or 8) for f in (prompts.max_len, prompts.source_max_len))
    tokens, source = (shape_dtype((1, n), 'int32') for n in (length, of_source))
    mask = shape_dtype((1, of_source), bool)
    if class_names(net) is not None and net.n_in > 1:
        return (*(tokens,) * (net.n_in - 1), shape_dtype(tokens.shape, bool))
    return (tokens,) if net.n_in == 1 else (source, tokens, mask)[: net.n_in]
