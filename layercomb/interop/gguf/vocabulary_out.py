"""The tokenizer of a pretrained model as the metadata of a .gguf file."""

from __future__ import annotations

import json
from typing import Any

from layercomb.errors import UsageError, require
from layercomb.interop.gguf.vocabulary import CUTS, GPT2_WORDS, Type, Vocabulary, merges_of_scores
from layercomb.interop.tokenizer import PretrainedTokenizer

_CURE = 'save the model as a directory of Hugging Face'
_NEVER = -1e9  # the score of a piece that no merge makes


def vocabulary_of(tokenizer: Any, n_tokens: int) -> Vocabulary:
    """A tokenizer in the terms of GGUF.

    Args:
      tokenizer: a `PretrainedTokenizer` whose vocabulary is a byte-level BPE with one of the cuts
        in `vocabulary.CUTS`, or a BPE of pieces with bytes for what has none.
      n_tokens: of the model; ids without a token get an unused one.

    Raises:
      UsageError: for other tokenizers, or one of another vocabulary.
    """
    if not isinstance(tokenizer, PretrainedTokenizer) or not hasattr(
        tokenizer.vocabulary, 'source'
    ):
        raise UsageError(f'this tokenizer has no place in a .gguf file: {_CURE}')
    if tokenizer.vocab_size > n_tokens:
        raise UsageError(
            f'the tokenizer has {tokenizer.vocab_size:,} tokens and the model {n_tokens:,}: take '
            'the tokenizer of this model'
        )
    source = json.loads(tokenizer.vocabulary.source)
    model = source['model']
    if model['type'] != 'BPE' or model.get('dropout'):
        raise UsageError(f'a tokenizer of type {model["type"]} has no place in a .gguf: {_CURE}')
    pieces = bool(model.get('byte_fallback'))
    tokens, types = _tokens(source, n_tokens, pieces)
    merges: list[tuple[str, str]] = [
        (left, right)
        for left, right in (m.split(' ') if isinstance(m, str) else m for m in model['merges'])
    ]
    ends = tokenizer.vocabulary.encode('', whole=True)
    unknown = model.get('unk_token') or tokenizer.tokens.get('unk_token')
    made = Vocabulary(
        kind='llama' if pieces else 'gpt2',
        cut=None if pieces else _cut(source),
        tokens=tokens,
        types=types,
        scores=_scores(merges, tokens) if pieces else (),
        merges=() if pieces else tuple(merges),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        unknown_id=None if unknown is None else tokenizer.vocabulary.id_of(unknown),
        stop_ids=tokenizer.stop_ids,
        adds_bos=bool(ends) and ends[0] == tokenizer.bos_id,
        adds_eos=bool(ends) and ends[-1] == tokenizer.eos_id,
        adds_space='Prepend' in json.dumps(source['normalizer']),
        template=None if tokenizer.chat is None else tokenizer.chat.source,
    )
    _check_alike(made, source, merges, len(ends))
    return made


def metadata_of(v: Vocabulary) -> dict[str, Any]:
    """The metadata of a file with this tokenizer: the inverse of `vocabulary.vocabulary`."""
    roles = {'bos': v.bos_id, 'eos': v.eos_id, 'unknown': v.unknown_id}
    more = [i for i in v.stop_ids if i != v.eos_id]
    roles |= dict(zip(('eot', 'eom'), more, strict=False))
    made: dict[str, Any] = {
        'model': v.kind,
        'pre': v.cut or 'default',
        'tokens': list(v.tokens),
        'token_type': list(v.types),
        'scores': list(v.scores),
        'merges': [' '.join(pair) for pair in v.merges],
        **{f'{role}_token_id': i for role, i in roles.items() if i is not None},
        'add_bos_token': v.adds_bos,
        'add_eos_token': v.adds_eos,
        'add_space_prefix': v.adds_space,
    }
    named = {f'tokenizer.ggml.{name}': value for name, value in made.items() if value != []}
    return named if v.template is None else {**named, 'tokenizer.chat_template': v.template}


def _tokens(
    source: dict[str, Any], n: int, pieces: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tokens by id, and their types."""
    found: dict[int, tuple[str, int]] = {}
    for token, i in source['model']['vocab'].items():
        is_byte = pieces and len(token) == 6 and token.startswith('<0x')
        found[i] = token, Type.BYTE if is_byte else Type.NORMAL
    for each in source['added_tokens']:
        found[each['id']] = each['content'], Type.CONTROL if each['special'] else Type.OWN
    unknown = source['model'].get('unk_token')
    made = [found.get(i, (f'[PAD{i}]', Type.UNUSED)) for i in range(n)]
    types = tuple(int(Type.UNKNOWN if t == unknown and pieces else kind) for t, kind in made)
    return tuple(token for token, _ in made), types


def _cut(source: dict[str, Any]) -> str:
    """The name of the cut that a pre-tokenizer makes.

    Raises:
      UsageError: if it has none.
    """
    patterns = tuple(_patterns(source['pre_tokenizer'] or {}))
    composed = (source['normalizer'] or {}).get('type') == 'NFC'
    whole = bool(source['model'].get('ignore_merges'))
    for name, cut in CUTS.items():
        if (cut.patterns, cut.composed, cut.whole_words) == (patterns, composed, whole):
            return name
    raise UsageError(
        f'the pre-tokenizer is none of those that .gguf files name, {", ".join(CUTS)}: {_CURE}'
    )


def _patterns(step: dict[str, Any]) -> list[str]:
    """The regular expressions of a pre-tokenizer; None of them is the name of an unknown step."""
    kind = step.get('type')
    if kind == 'Sequence':
        return [pattern for each in step['pretokenizers'] for pattern in _patterns(each)]
    if kind == 'Digits' and step['individual_digits']:
        return [r'\p{N}']
    if kind == 'Split' and step['behavior'] == 'Isolated' and not step['invert']:
        return [step['pattern'].get('Regex', kind)]
    if kind == 'ByteLevel' and not step['add_prefix_space']:
        return [GPT2_WORDS] if step['use_regex'] else []
    return [str(kind)]


def _scores(merges: list[tuple[str, str]], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """A score for each piece, so that they order the merges as they are."""
    first: dict[str, float] = {}
    for left, right in merges:
        first.setdefault(left + right, -float(len(first)))
    return tuple(first.get(token, _NEVER) for token in tokens)


def _check_alike(
    v: Vocabulary, source: dict[str, Any], merges: list[tuple[str, str]], n_ends: int
) -> None:
    """Raises a UsageError if the file would hold another tokenizer than this one."""
    library = require('tokenizers', 'pretrained')
    made = json.loads(v.tokenizer().to_str())
    same = made['normalizer'] == source['normalizer'] and n_ends == v.adds_bos + v.adds_eos
    if v.kind == 'llama':
        ids = {token: i for i, token in enumerate(v.tokens)}
        same &= merges_of_scores(v, ids) == merges
        same &= made['pre_tokenizer'] == source['pre_tokenizer']
        same &= made['decoder'] == source['decoder']
    else:
        same &= (source['decoder'] or {}).get('type') == 'ByteLevel'
    if not same or len(v.stop_ids) > 3:
        raise UsageError(
            f'this tokenizer, made by tokenizers {library.__version__} or like it, says more than '
            f'a .gguf file can: {_CURE}'
        )
