"""`load`: a model of Trax 1.4.1, from the checkpoint of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.interop.trax import architectures, files, flat_weights, parameters
from layercomb.interop.trax.subwords import SubwordTokenizer, read_subwords
from layercomb.model import Model


def load(
    path: str | Path,
    *,
    model: str | None = None,
    config: str | Path | None = None,
    vocab: str | Path | None = None,
    **known: Any,
) -> tuple[Model, SubwordTokenizer | None]:
    """Reads a `TransformerLM`, `Transformer` or `ReformerLM` that Trax 1.4.1 trained.

    The model computes what that of Trax computes in evaluation, with two differences. It does not
    shift its inputs: they begin with 0, where Trax puts a 0 before them. And a `Transformer` takes
    a third input, the mask of the source, ``source != 0``. LSH attention draws other rotations than
    Trax, which draws new ones at each call; so its outputs are equal where one chunk holds the
    whole sequence. Dropout is left out.

    Nothing in the files is run: the pickle is read by a machine that knows arrays and plain values
    only. Every weight is accounted for.

    Args:
      path: of ``model.pkl.gz``, or of the directory that holds it. Weights may be in the pickle, or
        in ``model.weights.npy.gz`` beside it.
      model: the name in Trax; by default as `config` says, or as the weights look.
      config: the run's ``config.gin``; by default the one beside the checkpoint, if there is one.
      vocab: a subword vocabulary, such as ``en_8k.subword``.
      **known: parameters that weights do not tell, as they are named in Trax: ``n_heads=8,
        ff_activation='Relu'``; of a `ReformerLM` also ``attention_type=['SelfAttention',
        'LSHSelfAttention'], chunk_len=64, n_hashes=4, n_buckets=None``. They override `config`.

    Returns:
      The model, with weights, and the tokenizer of `vocab`, or None.

    Raises:
      UsageError: if a file cannot be read, is damaged, or names code; if weights are missing, left
        over or of another shape; or if a parameter is not known that weights do not tell.
    """
    file = files.checkpoint(path)
    given = files.weights_of(file)
    what = _parameters(file, config, known if model is None else {**known, 'model': model})
    name = what.model(architectures.guess(given.shapes))
    plan = architectures.plan(name, given.shapes, what)
    flat_weights.check(plan.entries, plan.shapes, given.what, name)
    tokenizer = None if vocab is None else read_subwords(paths.local(vocab, 'vocab'))
    weights = flat_weights.fill(plan.net, plan.signature, plan.entries, given)
    return Model(plan.net, weights, {}), tokenizer


def _parameters(
    checkpoint: Path, config: str | Path | None, known: dict[str, Any]
) -> parameters.Parameters:
    """What is known of a model besides its weights."""
    beside = checkpoint.with_name('config.gin')
    if config is not None:
        beside = paths.local(config, 'config')
    elif not beside.exists():
        return parameters.Parameters({}, known, has_config=False)
    return parameters.Parameters(parameters.read_gin(beside), known, has_config=True)
