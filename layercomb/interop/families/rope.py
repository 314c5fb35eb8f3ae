"""Rotary positions in a config.json, in its old form and in that of transformers 5.

The old form has ``rope_theta`` and ``rope_scaling`` apart; the new one has all in
``rope_parameters``, for each kind of layer if kinds differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layercomb import layers as tl
from layercomb.errors import UsageError
from layercomb.interop.configs import Config

_NESTED = ('full_attention', 'sliding_attention')


def rotary(
    config: Config,
    period: float = 10000.0,
    kind: str | None = None,
    theta: str = 'rope_theta',
    long: bool = False,
) -> dict[str, Any]:
    """What a configuration says about rotary positions, as arguments of a model.

    Args:
      config: of the model.
      period: the default.
      kind: which of several kinds of layers, e.g. 'full_attention', which alone ``rope_scaling``
        is about; None if all are of one kind.
      theta: the entry that has the period in the old form.
      long: whether the model is a Phi-3: only a part of the features may turn, and 'su' and 'yarn'
        are old names of 'longrope'.

    Returns:
      ``period`` and ``scaling``, and ``share`` if it is not 1.

    Raises:
      UsageError: for a type of scaling that is unknown, or an entry that is.
    """
    outside = config.number(theta, period)
    given = Config(_given(config, kind))
    types = {name: name for name in _READERS}
    word = 'rope_type' if 'rope_type' in given else 'type'
    name = given.one_of(word, types, 'default')
    name = 'longrope' if long and name in ('su', 'yarn') else name
    scaling = _READERS[name](given, config)
    given.get('type')  # beside rope_type it says the same in old words
    share = given.number('partial_rotary_factor', config.number('partial_rotary_factor', 1.0))
    if share != 1 and not long:
        raise UsageError(
            f"config.json: 'partial_rotary_factor' is {share}, and only 1 is understood in models "
            'of this type: this model cannot be loaded'
        )
    made: dict[str, Any] = {'period': given.number('rope_theta', outside), 'scaling': scaling}
    given.check_read('rotary positions')
    return made if share == 1 else {**made, 'share': share}


def max_len(config: Config, scaling: Any) -> int:
    """The longest sequence: a dynamic scaling reaches beyond the trained length.

    Args:
      config: of the model.
      scaling: of its rotary positions.
    """
    trained = config.count('max_position_embeddings', 2048)
    grows = isinstance(scaling, tl.DynamicScaling)
    return max(trained, round(trained * scaling.factor)) if grows else trained


def written(positions: tl.RotaryPositions) -> dict[str, Any]:
    """The inverse of `rotary` and `max_len`, in the old form, which all versions read.

    Args:
      positions: of the model.
    """
    scaling = positions.scaling
    longest = scaling.max_len if isinstance(scaling, tl.DynamicScaling) else positions.max_len
    return {
        'max_position_embeddings': longest,
        'rope_theta': positions.period,
        'rope_scaling': None if scaling is None else parameters(scaling),
    }


def parameters(scaling: tl.RotaryScaling) -> dict[str, Any]:
    """A scaling as ``rope_scaling`` has it.

    Args:
      scaling: one of those that `rotary` reads.
    """
    kind, names = _WORDS[type(scaling)]
    values = {theirs: getattr(scaling, ours) for ours, theirs in names.items()}
    values = {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}
    return {'rope_type': kind, **{name: x for name, x in values.items() if x is not None}}


def _given(config: Config, kind: str | None) -> dict[str, Any]:
    """The entries about rotary positions; those of one kind of layer if they are nested."""
    old, new = config.get('rope_scaling', {}), config.get('rope_parameters', {})
    for name, entries in (('rope_scaling', old), ('rope_parameters', new)):
        if not isinstance(entries, dict):
            raise UsageError(
                f'config.json: {name!r} is {entries!r:.60} and not an object: take the file that '
                'came with the model'
            )
    if kind is not None:
        if new and not {*new} <= {*_NESTED}:
            raise UsageError(
                f'config.json: rope_parameters has {", ".join(new)}, and must have '
                f'{" and ".join(_NESTED)}: take the file that came with the model'
            )
        return dict(new.get(kind) or (old if kind == _NESTED[0] else {}))
    if old and new and old != {name: new.get(name) for name in old}:
        raise UsageError(
            'config.json: rope_scaling and rope_parameters contradict each other: remove one'
        )
    return {**old, **new}


def _linear(given: Config, config: Config) -> Any:
    del config
    return tl.LinearScaling(given.number('factor'))


def _dynamic(given: Config, config: Config) -> Any:
    trained = config.count('max_position_embeddings', 2048)
    given.must_be('original_max_position_embeddings', trained)
    return tl.DynamicScaling(given.number('factor'), trained)


def _llama3(given: Config, config: Config) -> Any:
    return tl.Llama3Scaling(
        given.number('factor'),
        given.number('low_freq_factor'),
        given.number('high_freq_factor'),
        _original(given, config),
    )


def _yarn(given: Config, config: Config) -> Any:
    original = _original(given, config)
    factor = given.number('factor', config.count('max_position_embeddings', 2048) / original)
    more = ('attention_factor', 'mscale', 'mscale_all_dim')
    return tl.YarnScaling(
        factor,
        original,
        given.number('beta_fast', 32.0),
        given.number('beta_slow', 1.0),
        **{name: given.number(name) for name in more if given.get(name) is not None},
        truncate=bool(given.get('truncate', True)),
    )


def _longrope(given: Config, config: Config) -> Any:
    original = _original(given, config)
    factor = given.number('factor', config.count('max_position_embeddings', 2048) / original)
    attention = given.get('attention_factor')
    return tl.LongRopeScaling(
        given['short_factor'],
        given['long_factor'],
        original,
        factor,
        None if attention is None else given.number('attention_factor'),
    )


def _original(given: Config, config: Config) -> int:
    """The trained length, which Phi-3 has outside."""
    name = 'original_max_position_embeddings'
    outside = config.get(name)
    inside = given.get(name)
    return (
        config.count(name)
        if outside is not None and inside is None
        else given.count(name, config.count('max_position_embeddings', 2048))
    )


_READERS: dict[str, Callable[[Config, Config], Any]] = {
    'default': lambda given, config: None,
    'linear': _linear,
    'dynamic': _dynamic,
    'llama3': _llama3,
    'yarn': _yarn,
    'longrope': _longrope,
    'su': _longrope,
}
_ORIGINAL = {'original_max_len': 'original_max_position_embeddings'}
_YARN = ('factor', 'beta_fast', 'beta_slow', 'attention_factor', 'mscale', 'mscale_all_dim')
_WORDS: dict[type, tuple[str, dict[str, str]]] = {
    tl.LinearScaling: ('linear', {'factor': 'factor'}),
    tl.DynamicScaling: ('dynamic', {'factor': 'factor'}),
    tl.Llama3Scaling: (
        'llama3',
        {n: n for n in ('factor', 'low_freq_factor', 'high_freq_factor')} | _ORIGINAL,
    ),
    tl.YarnScaling: ('yarn', {n: n for n in (*_YARN, 'truncate')} | _ORIGINAL),
    tl.LongRopeScaling: (
        'longrope',
        {
            'short_factors': 'short_factor',
            'long_factors': 'long_factor',
            'factor': 'factor',
            'attention_factor': 'attention_factor',
        }
        | _ORIGINAL,
    ),
}
