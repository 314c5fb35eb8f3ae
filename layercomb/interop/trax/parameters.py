"""The parameters of a model of Trax: those given by the caller, and those of a ``config.gin``.

Weights tell most of a model. What they do not tell, such as the number of heads, is asked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layercomb.errors import UsageError, machine_errors

LENGTH = 2**20  # of a file; Trax writes some thousand letters
MOST = 10**9

# What Trax 1.4.1 has, and the value that it takes when it is given none.
ATTENTION: dict[str, dict[str, Any]] = {
    'CausalAttention': {},
    'SelfAttention': {
        'share_qk': False,
        'chunk_len': None,
        'n_chunks_before': 0,
        'n_chunks_after': 0,
        'bias': False,
    },
    'LSHSelfAttention': {
        'chunk_len': 128,
        'n_chunks_before': 1,
        'n_chunks_after': 0,
        'n_hashes': 1,
        'n_buckets': None,
    },
}
_COMMON = ('d_model', 'd_ff', 'n_heads', 'max_len', 'ff_activation')
MODELS: dict[str, dict[str, Any]] = {
    'TransformerLM': dict.fromkeys(('vocab_size', 'n_layers', *_COMMON)),
    'Transformer': dict.fromkeys(
        ('input_vocab_size', 'output_vocab_size', 'n_encoder_layers', 'n_decoder_layers', *_COMMON)
    ),
    'ReformerLM': {
        **dict.fromkeys(('vocab_size', 'n_layers', *_COMMON)),
        **dict.fromkeys(('d_attention_key', 'd_attention_value', 'attention_type')),
        **dict.fromkeys(('pos_type', 'pos_axial_shape', 'pos_d_axial_embs')),
        'ff_use_sru': 0,
        'ff_sparsity': 0,
        'loss_sparsity': 0,
        'loss_sparsity_prob': None,
    },
}
# Parameters that concern training or speed, and not what is computed.
_WITHOUT_EFFECT = {
    *('dropout', 'dropout_shared_axes', 'mode', 'ff_chunk_size', 'attention_chunk_size'),
    *('pos_start_from_zero_prob', 'pos_max_offset_to_add', 'loss_sparsity_type', 'loss_d_lowrank'),
    *('n_parallel_heads', 'use_python_loop', 'use_reference_code', 'predict_mem_len'),
    *('predict_drop_len', 'attention_dropout', 'output_dropout'),
}
# Of what Trax lets a gin file change anywhere, the values that these models are computed with.
_FIXED: dict[str, dict[str, Any]] = {
    'LayerNorm': {'center': True, 'epsilon': 1e-6},
    'PositionalEncoding': {'d_feature': None},
}
_STATEMENT = re.compile(r'([\w./]+?)(?:\.(\w+))?\s*=\s*(.*)', re.DOTALL)
_PARTS = re.compile(
    r"""('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(\#[^\n]*)|@([\w./]+)(?:\(\))?|%([\w./]+)"""
)


class Parameters:
    """What is known of a model besides its weights.

    Args:
      bindings: values by ``Class.parameter``, as a gin file has them.
      given: values that the caller gave, by the parameter's name alone. They come first.
      has_config: whether there was a gin file. Parameters that are not in it then have Trax's
        defaults.
    """

    def __init__(self, bindings: Mapping[str, str], given: Mapping[str, Any], has_config: bool):
        self._bindings, self._given, self._has_config = bindings, given, has_config
        self._asked: list[str] = []

    def model(self, guess: str | None) -> str:
        """The name of the model: the caller's, the gin file's, or a guess from the weights.

        Raises:
          UsageError: if the name is none of `MODELS`, or there is none.
        """
        name = self._given.get('model') or self._value('train.model') or guess
        if name not in MODELS:
            said = 'its weights are those of none' if name is None else f'it is a {name}'
            raise UsageError(
                f'a model of Trax that can be read is {", ".join(MODELS)}, and {said}: say '
                'model=… if it is one of them'
            )
        return str(name)

    def check(self, model: str) -> None:
        """Raises a UsageError for parameters that are unknown, or change what is computed here."""
        known = {**MODELS[model]}
        for kind in ATTENTION if model == 'ReformerLM' else ():
            known |= ATTENTION[kind]
        for name in self._given.keys() - known.keys() - {'model'}:
            raise UsageError(
                f'{model} of Trax has no parameter {name}, or one that its weights need not: there '
                f'are {", ".join(sorted(known))}'
            )
        for key in self._bindings:
            owner, _, name = key.rpartition('.')
            if owner == model and name not in {*known, *_WITHOUT_EFFECT}:
                raise UsageError(f'{key}: {model} of Trax 1.4.1 has no such parameter: remove it')
            if owner.rpartition('/')[2] != owner and owner.endswith((model, *ATTENTION, *_FIXED)):
                raise UsageError(f'{key}: values in a scope are not read: write it without')
        for owner, fixed in _FIXED.items():
            for name, value in fixed.items():
                self.expect(owner, name, value)
        for name in ('ff_use_sru', 'ff_sparsity', 'loss_sparsity', 'loss_sparsity_prob'):
            if name in known:
                self.expect(model, name, known[name])

    def expect(self, owner: str, name: str, value: Any) -> None:
        """Raises a UsageError if a parameter has another value than that which is computed here."""
        found = self.get(owner, name, value)
        if found != value:
            raise UsageError(
                f'{owner}.{name} = {found!r}: layercomb reads models of {value!r} only'
            )

    def get(self, owner: str, name: str, default: Any = None) -> Any:
        """The value of a parameter, or the default."""
        if name in self._given and (owner in MODELS or owner in ATTENTION):
            return self._given[name]
        key = f'{owner}.{name}'
        return self._value(key) if key in self._bindings else default

    def size(self, owner: str, name: str, default: int) -> int:
        """A number of things: as `get`, from 1 on.

        Raises:
          UsageError: if it is none.
        """
        value = self.get(owner, name, default)
        if type(value) is not int or not 1 <= value <= MOST:
            raise UsageError(f'{owner}.{name} = {value!r}: a number from 1 to {MOST:,} is needed')
        return value

    def ask(self, owner: str, name: str, default: Any = ...) -> Any:
        """The value of a parameter that weights do not tell.

        If it is not known, Trax's default stands in where there is a gin file. Else
        `refuse_unknown` will ask for it; ``...`` is no default.
        """
        known = name in self._given or f'{owner}.{name}' in self._bindings
        if not known and (not self._has_config or default is ...):
            said = '…' if default is ... else f'{default!r} (the default of Trax)'
            if (line := f'{name}={said}') not in self._asked:
                self._asked.append(line)
        return self.get(owner, name, None if default is ... else default)

    def refuse_unknown(self, model: str) -> None:
        """Raises a UsageError that lists what was asked for and is not known."""
        if self._asked:
            unknown = ' nor '.join(self._asked)
            raise UsageError(
                f'the weights of this {model} do not tell {unknown}: pass that to load, or as '
                "config= the run's config.gin"
            )

    def _value(self, key: str, depth: int = 0) -> Any:
        """The value of a binding; references are names of classes."""
        if key not in self._bindings:
            return None
        text = self._bindings[key]

        def plain(part: re.Match[str]) -> str:
            string, comment, reference, macro = part.groups()
            if reference:
                return repr(re.split(r'[./]', reference)[-1])
            if macro and depth < 8:
                return repr(self._value(macro, depth + 1))
            return string or ('' if comment else part[0])

        try:
            if len(text) > 10_000:
                raise ValueError('it is too long')
            return ast.literal_eval(_PARTS.sub(plain, text).strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise UsageError(
                f'{key} = {text[:60]!r}: only numbers, strings, lists and names of layers are read'
            ) from None


def read_gin(path: Path) -> dict[str, str]:
    """The statements of a gin file, ``Class.parameter`` to the text of its value; none is run.

    Args:
      path: of the file.

    Raises:
      UsageError: if it cannot be read, or is no text.
    """
    with machine_errors('check the path'), path.open('rb') as file:
        data = file.read(LENGTH + 1)
    if len(data) > LENGTH:
        raise UsageError(f'{path.name} is longer than {LENGTH:,} bytes, as no gin file is')
    try:
        lines = data.decode('utf-8').splitlines()
    except UnicodeDecodeError:
        raise UsageError(f'{path.name} is no text, as a gin file is: check the path') from None
    bindings = {}
    for text in _statements(lines):
        found = _STATEMENT.fullmatch(text)
        if found is not None:
            name, parameter, value = found.groups()
            owner = name if '/' in name else name.rpartition('.')[2]
            bindings[f'{owner}.{parameter}' if parameter else name] = value
    return bindings


def _statements(lines: Iterable[str]) -> Iterable[str]:
    """Statements of a gin file: lines, those joined that end in a backslash or an open bracket."""
    text, n_open = '', 0
    for line in lines:
        bare = _PARTS.sub(lambda part: '' if part[2] else part[0], line).rstrip()
        without_strings = _PARTS.sub('', bare)
        n_open += sum(map(without_strings.count, '([{')) - sum(map(without_strings.count, ')]}'))
        text += bare.removesuffix('\\') + '\n'
        if n_open <= 0 and not bare.endswith('\\'):
            if text.strip():
                yield text.strip()
            text, n_open = '', 0
    if text.strip():
        yield text.strip()
