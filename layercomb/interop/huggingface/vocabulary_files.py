"""The tokenizer of a directory: its vocabulary, special tokens, chat template and advice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate, template_in
from layercomb.interop.stored import is_size, mapped, parse_json, read_json
from layercomb.interop.tokenizer import PretrainedTokenizer, sampling_advice
from layercomb.interop.vocabularies import SentencePieces, Subwords, Vocabulary

TOKENIZER, SETTINGS, TEMPLATE = 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'
GENERATION = 'generation_config.json'
_TOKENS = 'special_tokens_map.json'
# Vocabularies in other files, which transformers turns into a tokenizer.json.
_OTHERS = ('vocab.txt', 'merges.txt', 'sentencepiece.bpe.model', 'tekken.json')
_PIECES = ('spiece.model', 'tokenizer.model')
# All that a tokenizer may be read from.
FILES = (
    TOKENIZER, SETTINGS, TEMPLATE, GENERATION, _TOKENS, 'added_tokens.json', *_PIECES,
    'source.spm', 'target.spm', 'vocab.json',
)  # fmt: skip
_CURE = (
    'make a tokenizer.json by AutoTokenizer.from_pretrained(directory).save_pretrained(directory) '
    'of transformers'
)


def tokenizer_in(directory: Path, config: Mapping[str, Any]) -> PretrainedTokenizer | None:
    """The tokenizer in a directory; None if there is none.

    Args:
      directory: absolute.
      config: the content of its config.json.

    Raises:
      UsageError: if a file is damaged, or is of a kind that is not read here.
    """
    settings = _if_there(directory / SETTINGS)
    tokens = _special_tokens(_if_there(directory / _TOKENS)) | _special_tokens(settings)
    vocabulary = _vocabulary(directory, settings, tokens)
    if vocabulary is None:
        return None
    generation = _if_there(directory / GENERATION)
    ends = _ids(generation.get('eos_token_id', config.get('eos_token_id')), vocabulary)
    own = [
        vocabulary.id_of(tokens[name])
        for name in ('eos_token', 'sep_token', 'pad_token')
        if name in tokens
    ]
    # An encoder has no token that ends a text: one that separates texts will do.
    eos_id = next((i for i in (*own[: 'eos_token' in tokens], *ends, *own) if i is not None), None)
    if eos_id is None:
        raise UsageError(
            f'no token ends a text: say "eos_token" in {SETTINGS}, or "eos_token_id" in '
            f'{GENERATION}'
        )
    bos_id = vocabulary.id_of(tokens['bos_token']) if 'bos_token' in tokens else None
    return PretrainedTokenizer(
        vocabulary, eos_id, bos_id, tuple(ends), _chat(directory, settings, tokens),
        sampling_advice(generation), tokens, _start_id(generation, config),
    )  # fmt: skip


def _start_id(generation: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The token that a decoder starts from; None for models without an encoder."""
    if not config.get('is_encoder_decoder'):
        return None
    name = 'decoder_start_token_id'
    found = generation.get(name, config.get(name))
    if found is not None and not is_size(found):
        raise UsageError(f'{name} is {found!r:.60}, and must be one id: take the original file')
    return found


def _if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The entries ``…_token``: a text, or an object with the text as its content."""
    made = {}
    for name, value in settings.items():
        content = value.get('content') if isinstance(value, dict) else value
        if name.endswith('_token') and isinstance(content, str):
            made[name] = content
    return made


def _ids(given: Any, vocabulary: Vocabulary) -> list[int]:
    """The ids that end an answer; those outside the vocabulary never come."""
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not all(map(is_size, found)):
        raise UsageError(f'eos_token_id is {given!r:.60}, and must be one id or a list of ids')
    return [i for i in found if i < vocabulary.size]


def _chat(
    directory: Path, settings: Mapping[str, Any], tokens: Mapping[str, str]
) -> ChatTemplate | None:
    source = template_in(settings.get('chat_template'))
    if (directory / TEMPLATE).is_file():
        source = _text(directory / TEMPLATE)
    return None if source is None else ChatTemplate(source, tokens)


def _text(path: Path) -> str:
    try:
        return bytes(mapped(path)).decode('utf-8')
    except UnicodeDecodeError:
        raise UsageError(f'{path.name} is damaged (no UTF-8): download it again') from None


def _vocabulary(
    directory: Path, settings: Mapping[str, Any], tokens: Mapping[str, str]
) -> Vocabulary | None:
    if (directory / TOKENIZER).is_file():
        return Subwords(_text(directory / TOKENIZER))
    if (directory / 'source.spm').is_file():
        return _marian(directory, tokens)
    for name in _PIECES:
        if (directory / name).is_file():
            return _pieces(directory, name, settings, tokens)
    for name in _OTHERS:
        if (directory / name).is_file():
            raise UsageError(f'the vocabulary is in {name}, which is not read: {_CURE}')
    return None


def _pieces(
    directory: Path, name: str, settings: Mapping[str, Any], tokens: Mapping[str, str]
) -> SentencePieces:
    """The vocabulary of T5, Reformer or Llama in a sentencepiece model.

    Raises:
      UsageError: for tokenizers of another class, which treat texts in ways of their own.
    """
    kind = str(settings.get('tokenizer_class', '')).removesuffix('Fast')
    if kind not in ('T5Tokenizer', 'ReformerTokenizer', 'LlamaTokenizer', 'GemmaTokenizer'):
        raise UsageError(f'the vocabulary is in {name} for a {kind or "tokenizer"!r:.40}: {_CURE}')
    plain = SentencePieces(bytes(mapped(directory / name)))
    added = _added(directory, settings)
    n_extra = settings.get('extra_ids', 100) if kind == 'T5Tokenizer' and not added else 0
    if not is_size(n_extra) or n_extra > 10_000:
        raise UsageError(f'{SETTINGS}: extra_ids is {n_extra!r:.40}: take the original file')
    added |= {f'<extra_id_{i}>': plain.size + n_extra - 1 - i for i in range(n_extra)}
    special = {token: i for token in tokens.values() if (i := plain.id_of(token)) is not None}
    ends = {'bos': kind in ('LlamaTokenizer', 'GemmaTokenizer'), 'eos': kind == 'T5Tokenizer'}
    sides = []
    for side, default in ends.items():
        i = special.get(tokens.get(f'{side}_token', ''))
        said = settings.get(f'add_{side}_token', default)
        sides.append((i,) if said and i is not None else ())
    hidden = {i for t, i in added.items() if t in tokens.values() or t.startswith('<extra_id_')}
    return SentencePieces(
        plain.model,
        added=tuple(({**special, **added}).items()),
        special=frozenset(special.values()) | hidden,
        prefix=sides[0],
        suffix=sides[1],
    )


def _added(directory: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens beside those of the sentencepiece model, by their text."""
    given = settings.get('added_tokens_decoder')
    if isinstance(given, dict):
        pairs = [(x.get('content'), i) for i, x in given.items() if isinstance(x, dict)]
        made = {str(token): int(i) for token, i in pairs if str(i).isdecimal() and len(i) < 10}
    else:
        made = _if_there(directory / 'added_tokens.json')
    if not all(is_size(i) and i < 2**31 for i in made.values()):
        raise UsageError('added_tokens.json is damaged: download it again')
    return made


def _marian(directory: Path, tokens: Mapping[str, str]) -> SentencePieces:
    """The vocabulary of Marian: pieces of two files, numbered in a third."""
    ids = parse_json(bytes(mapped(directory / 'vocab.json')), 'vocab.json')
    if not ids or not all(is_size(i) and i < 2**31 for i in ids.values()):
        raise UsageError('vocab.json is damaged: download it again')
    special = {token: ids[token] for token in tokens.values() if token in ids}
    eos = special.get(tokens.get('eos_token', '</s>'), ids.get('</s>'))
    languages = {token: i for token, i in ids.items() if token[:2] == '>>' and token[-2:] == '<<'}
    return SentencePieces(
        bytes(mapped(directory / 'source.spm')),
        bytes(mapped(directory / 'target.spm')),
        tuple(ids.items()),
        tuple(({**special, **languages}).items()),
        frozenset((*special.values(), *languages.values())),
        suffix=() if eos is None else (eos,),
    )
