"""`load`: a model and its tokenizer from a .gguf file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError, usage_errors
from layercomb.interop.chat_template import ChatTemplate
from layercomb.interop.configs import Config
from layercomb.interop.families import family_of
from layercomb.interop.gguf.architectures import architecture_of, config_of_file
from layercomb.interop.gguf.file import File, read
from layercomb.interop.gguf.rope import FACTORS
from layercomb.interop.gguf.vocabulary import vocabulary
from layercomb.interop.gguf.weights import load_narrow, load_wide
from layercomb.interop.tensors import shapes_of
from layercomb.interop.tokenizer import PretrainedTokenizer, sampling_advice
from layercomb.interop.weight_cache import look, weights_of
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.transforms.buffers import give_back

# What `generation` calls the makers' advice.
_SAMPLING = {
    'general.sampling.temp': 'temperature',
    'general.sampling.top_p': 'top_p',
    'general.sampling.top_k': 'top_k',
    'general.sampling.penalty_repeat': 'repetition_penalty',
}


def load(
    path: str | Path, *, dtype: str | None = None, cache: str | Path | None = None
) -> tuple[Model, Any]:
    """Reads a model and its tokenizer from a .gguf file.

    Known are the architectures llama (with Mistral), qwen2, qwen3, gemma3 and gpt2, and tensors of
    the types F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K and Q6_K.

    Args:
      path: of the file.
      dtype: None keeps weights narrow: integers become int8 and int4 with the same numbers, and
        floats bfloat16. The matrices of one leaf, in all layers of the model, are of one kind,
        which holds all that the file has there. 'float32' widens all, without loss.
      cache: a folder where narrow weights are kept as they are laid out here, and mapped from the
        second load on, see `weight_cache.weights_of`; None writes nothing.

    Returns:
      (model, tokenizer); the tokenizer is None if the file has none.

    Raises:
      UsageError: if the file is damaged or of an unknown kind, if its metadata say what is not
        understood, if tensors are missing, left over or misshapen, or if the model does not fit
        into the free memory.
    """
    if dtype not in (None, 'float32'):
        raise UsageError(
            f'dtype={dtype!r}: give float32, or nothing to keep weights as narrow as in the file; '
            'quantize the float32 model for other dtypes'
        )
    kept_in = cache if dtype is None else None
    seen = look(kept_in, paths.local(path, 'path'))  # before it is opened: it may be replaced
    file = read(path)
    architecture = architecture_of(file)
    config = config_of_file(file, architecture)
    tokenizer = _tokenizer(file, config['vocab_size'])
    family = family_of(config)
    asked = Config(config)
    with usage_errors():
        net = family.net(asked)
        asked.check_read(family.name)
        entries = [architecture.renamed(entry) for entry in family.entries(asked)]
        shapes = shapes_of(net, family.signature(net))
    tensors = {name: architecture.tensor(each, config) for name, each in file.tensors.items()}
    ignored = (FACTORS.replace('.', r'\.'),)
    what = repr(str(file.path))
    if dtype is None:
        kept = partial(weights_of, cache, seen, {'reader': 'gguf'})
        net, weights = load_narrow(net, shapes, entries, tensors, ignored, what, kept)
    else:
        net, weights = load_wide(net, shapes, entries, tensors, ignored, what)
    give_back()
    return Model(net, weights), tokenizer


def describe(path: str | Path) -> tuple[Layer, PretrainedTokenizer | None]:
    """What a .gguf file says of a model besides its weights. No tensor is read.

    Args:
      path: of the file.

    Returns:
      (net, tokenizer): the layers, as wide ones, and the tokenizer; None if there is none.

    Raises:
      UsageError: as of `load`.
    """
    file = read(path)
    config = config_of_file(file, architecture_of(file))
    with usage_errors():
        net = family_of(config).net(Config(config))
    return net, _tokenizer(file, config['vocab_size'])


def net(path: str | Path) -> Layer:
    """The layers of the model in a .gguf file, as wide ones. No tensor is read.

    Args:
      path: of the file.

    Raises:
      UsageError: as of `load`.
    """
    file = read(path)
    config = config_of_file(file, architecture_of(file))
    with usage_errors():
        return family_of(config).net(Config(config))


def tokenizer(path: str | Path) -> PretrainedTokenizer | None:
    """The tokenizer in a .gguf file; None if there is none. No tensor is read.

    Args:
      path: of the file.

    Raises:
      UsageError: as of `load`.
    """
    file = read(path)
    return _tokenizer(file, config_of_file(file, architecture_of(file))['vocab_size'])


def _tokenizer(file: File, n_tokens: int) -> PretrainedTokenizer | None:
    """The tokenizer in a file's metadata; None if there is none."""
    if file.metadata.get('tokenizer.ggml.model', 'none') in ('none', 'no_vocab'):
        return None
    found = vocabulary(file.metadata, n_tokens)
    template = None
    if found.template is not None:
        template = ChatTemplate(found.template, found.special)
    advice = {ours: file.metadata[k] for k, ours in _SAMPLING.items() if k in file.metadata}
    advice = sampling_advice({**advice, 'do_sample': True}, 'general.sampling')
    ends = [i for i in (found.eos_id, *found.stop_ids) if i is not None]
    if not ends:
        raise UsageError(
            f'{str(file.path)!r} has no tokenizer.ggml.eos_token_id, so no answer would end: '
            'convert the model again with a recent llama.cpp'
        )
    return PretrainedTokenizer(
        found.tokenizer(),
        eos_id=ends[0],
        bos_id=found.bos_id,
        stop_ids=found.stop_ids,
        chat=template,
        generation=advice,
        tokens=found.special,
    )
