"""Tokenizers of .gguf files: their metadata as a tokenizer of the library `tokenizers`.

Two kinds are known. ``gpt2`` is byte-level BPE with a list of merges; how a text is cut into words
before that, the pre-tokenizer, has a name only, and those known are in `CUTS`. ``llama`` is BPE of
sentencepiece: whichever neighbours make the piece of the highest score are merged first, and
letters without a piece become their UTF-8 bytes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from layercomb.errors import UsageError, require

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2_WORDS = rf'{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+'
_LLAMA3 = (
    rf'(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s'
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_DEFAULT = (
    r'[\p{P}\$\+<=>\^~\|]+',
    rf'{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)',
    r'\p{N}+',
    r'[0-9][0-9][0-9]',
)


class Type(enum.IntEnum):
    """What a token is, as of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    OWN = 4  # a whole of several letters that merges do not make
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a text is cut into words before merges.

    Attributes:
      patterns: regular expressions; the words of each are cut by the next.
      whole_words: whether a word that is a token is one, whatever the merges say.
      composed: whether letters and their accents are composed first (NFC).
      begins: whether a text begins with the token of its beginning, where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


CUTS = {
    'gpt-2': Cut((GPT2_WORDS,)),
    'smollm': Cut((r'\p{N}', GPT2_WORDS)),
    'llama-bpe': Cut((_LLAMA3 % '{1,3}',), whole_words=True, begins=True),
    'qwen2': Cut((_LLAMA3 % '',), composed=True),
    'default': Cut(_DEFAULT),  # of llama.cpp, for files that do not say more
}
_SAME = {'llama3': 'llama-bpe', 'llama-v3': 'llama-bpe'}

_PIECE_SPACE = '▁'
_LONGEST = 1024  # letters of a token; the longest known are rows of some hundred spaces
# Tokens that end an answer, by their text, where a file names only one of several.
_ENDS = ('<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|endoftext|>', '<end_of_turn>', '<|end|>')
_READ = (
    'model', 'pre', 'tokens', 'token_type', 'scores', 'merges', 'bos_token_id', 'eos_token_id',
    'eot_token_id', 'eom_token_id', 'unknown_token_id', 'padding_token_id', 'add_bos_token',
    'add_eos_token', 'add_space_prefix',
    # Roles of tokens that matter to programs of other tasks.
    'seperator_token_id', 'mask_token_id', 'cls_token_id', 'fim_pre_token_id', 'fim_suf_token_id',
    'fim_mid_token_id', 'fim_pad_token_id', 'fim_rep_token_id', 'fim_sep_token_id',
    'prefix_token_id', 'suffix_token_id', 'middle_token_id', 'token_type_count', 'eot_token_ids',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer in a file's metadata.

    Attributes:
      kind: 'gpt2' or 'llama'.
      cut: the name in `CUTS`; None of kind 'llama'.
      tokens: by id.
      types: of the tokens.
      scores: of the tokens; empty of kind 'gpt2'.
      merges: pairs, the first is made first; empty of kind 'llama'.
      bos_id, eos_id: of the tokens at a text's beginning and end; None if there is none.
      unknown_id: of what has no token; None if there is none.
      stop_ids: tokens that end an answer.
      adds_bos, adds_eos: whether they are put around a text.
      adds_space: whether a space is put before a text, of kind 'llama'.
      template: the source of the chat template; None if there is none.
    """

    kind: str
    cut: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    template: str | None

    @property
    def special(self) -> dict[str, str]:
        """The texts of special tokens by their roles, such as 'eos_token'."""
        roles = {'bos_token': self.bos_id, 'eos_token': self.eos_id, 'unk_token': self.unknown_id}
        return {role: self.tokens[i] for role, i in roles.items() if i is not None}

    def tokenizer(self) -> Any:
        """The same as a `tokenizers.Tokenizer`.

        Raises:
          UsageError: if tokens and merges do not fit together.
        """
        library = require('tokenizers', 'pretrained')
        ids = {token: i for i, token in enumerate(self.tokens)}
        build = _byte_level if self.kind == 'gpt2' else _of_pieces
        try:
            made = build(library, self, ids)
        except Exception as e:  # of the library, which has no class for them
            raise UsageError(
                f'tokens and merges in the file do not fit together ({e!s:.200}): download it again'
            ) from None
        for special, kind in ((True, Type.CONTROL), (True, Type.UNKNOWN), (False, Type.OWN)):
            texts = [t for t, of in zip(self.tokens, self.types, strict=True) if of == kind and t]
            added = [library.AddedToken(t, special=special, normalized=False) for t in texts]
            made.add_special_tokens(added) if special else made.add_tokens(added)
        ends = [(self.bos_id, self.adds_bos), (self.eos_id, self.adds_eos)]
        before, after = ([self.tokens[i]] if adds and i is not None else [] for i, adds in ends)
        if before or after:
            parts = library.processors.TemplateProcessing(
                single=[*before, '$A', *after],
                pair=[*before, '$A', *after, *before, '$B:1', *after],
                special_tokens=[(t, ids[t]) for t in {*before, *after}],
            )
            made.post_processor = _with_byte_level(library, made.post_processor, parts)
        return made


def vocabulary(metadata: Mapping[str, Any], n_tokens: int) -> Vocabulary:
    """The tokenizer in a file's metadata.

    Args:
      metadata: of the file.
      n_tokens: how many the model has.

    Raises:
      UsageError: if it is of an unknown kind, damaged, or of another vocabulary.
    """
    of = _Entries(metadata)
    kind = of.one_of('model', ('gpt2', 'llama'), 'the kinds of tokenizers')
    tokens = of.listed('tokens', str, n_tokens)
    if len(set(tokens)) != n_tokens:
        raise UsageError('the file lists a token twice: download it again')
    longest = max(map(len, tokens), default=0)
    if kind == 'llama' and longest > _LONGEST:  # all its parts are looked up
        raise UsageError(f'the file has a token of {longest:,} letters: download it again')
    types = of.listed('token_type', int, n_tokens) if 'token_type' in of else (1,) * n_tokens
    cut = None
    if kind == 'gpt2':
        name = of.get('pre', 'default')
        cut = _SAME.get(name, name) if isinstance(name, str) else name
        of.one_of('pre', (*CUTS, *_SAME), 'the pre-tokenizers', 'default')
    of.check_read()
    ids = {name: of.token(name, n_tokens) for name in ('bos', 'eos', 'eot', 'eom', 'unknown')}
    by_text = {t: i for i, t in enumerate(tokens) if types[i] in (Type.CONTROL, Type.OWN)}
    stop = [ids['eos'], ids['eot'], ids['eom'], *(by_text.get(text) for text in _ENDS)]
    begins = CUTS[cut].begins if cut else True
    template = metadata.get('tokenizer.chat_template')
    return Vocabulary(
        kind,
        cut,
        tokens,
        types,
        of.listed('scores', float, n_tokens) if kind == 'llama' else (),
        _pairs(of.listed('merges', str)) if kind == 'gpt2' else (),
        ids['bos'],
        ids['eos'],
        ids['unknown'],
        tuple(dict.fromkeys(i for i in stop if i is not None)),
        of.flag('add_bos_token', begins) and ids['bos'] is not None,
        of.flag('add_eos_token', False) and ids['eos'] is not None,
        of.flag('add_space_prefix', kind == 'llama'),
        template if isinstance(template, str) and template else None,
    )


class _Entries:
    """The entries ``tokenizer.ggml.…``, each checked when it is read."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        start = 'tokenizer.ggml.'
        self._of = {k[len(start) :]: v for k, v in metadata.items() if k.startswith(start)}

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def get(self, name: str, default: Any = None) -> Any:
        return self._of.get(name, default)

    def one_of(self, name: str, known: Sequence[str], what: str, default: str | None = None) -> str:
        value = self._of.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise UsageError(
                f'tokenizer.ggml.{name} is {value!r:.60}, and {what} known are '
                f'{", ".join(known)}: this file cannot be loaded'
            )
        return value

    def listed(self, name: str, kind: type, n: int | None = None) -> Any:
        values = self._of.get(name)
        if not isinstance(values, list) or not all(type(v) is kind for v in values):
            raise UsageError(f'the file has no list tokenizer.ggml.{name}: download it again')
        if n is not None and len(values) != n:
            raise UsageError(
                f'tokenizer.ggml.{name} lists {len(values):,} and the model has {n:,} tokens: take '
                'a file whose tokenizer is that of the model'
            )
        return tuple(values)

    def token(self, role: str, n: int) -> int | None:
        name = f'{role}_token_id'
        value = self._of.get(name)
        if value is None or value == 2**32 - 1:  # llama.cpp's "there is none"
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise UsageError(
                f'tokenizer.ggml.{name} is {value!r:.40}, and there are {n:,} tokens: download the '
                'file again'
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._of.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(
                f'tokenizer.ggml.{name} is {value!r:.40} and not true or false: download the file '
                'again'
            )
        return value

    def check_read(self) -> None:
        """Raises for entries that are unknown, unless they are 0, false or empty."""
        left = [k for k, v in self._of.items() if k not in _READ and v not in (0, '', [])]
        if left:
            raise UsageError(
                f'tokenizer.ggml.{", ".join(left[:8])} is not understood: this file cannot be '
                'loaded'
            )


def _pairs(merges: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(merge.split(' ')) for merge in merges]
    wrong = [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]
    if wrong:
        raise UsageError(f'the merge {wrong[0]!r:.60} is no pair: download the file again')
    return tuple(pairs)  # type: ignore[arg-type]


def _byte_level(library: Any, v: Vocabulary, ids: dict[str, int]) -> Any:
    cut = CUTS[v.cut or 'default']
    made = library.Tokenizer(library.models.BPE(ids, list(v.merges), ignore_merges=cut.whole_words))
    if cut.composed:
        made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = cuts(library, cut)
    made.decoder = library.decoders.ByteLevel()
    made.post_processor = library.processors.ByteLevel(trim_offsets=False)
    return made


def cuts(library: Any, cut: Cut) -> Any:
    """The pre-tokenizer of a cut."""
    pre = library.pre_tokenizers
    splits = [pre.Split(library.Regex(pattern), 'isolated') for pattern in cut.patterns]
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _of_pieces(library: Any, v: Vocabulary, ids: dict[str, int]) -> Any:
    unknown = v.special.get('unk_token')
    made = library.Tokenizer(
        library.models.BPE(
            ids, merges_of_scores(v, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    n, d = library.normalizers, library.decoders
    spaces = [n.Replace(' ', _PIECE_SPACE)]
    made.normalizer = n.Sequence([n.Prepend(_PIECE_SPACE), *spaces] if v.adds_space else spaces)
    steps = [d.Replace(_PIECE_SPACE, ' '), d.ByteFallback(), d.Fuse()]
    made.decoder = d.Sequence([*steps, d.Strip(' ', 1, 0)] if v.adds_space else steps)
    return made


def merges_of_scores(v: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the highest score first.

    Args:
      v: of kind 'llama'.
      ids: of its tokens.
    """
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, score, kind in zip(v.tokens, v.scores, v.types, strict=True):
        if kind not in (Type.NORMAL, Type.OWN, Type.UNUSED):
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], (left, right)))
    found.sort()
    return [pair for *_, pair in found]


def _with_byte_level(library: Any, before: Any, parts: Any) -> Any:
    return parts if before is None else library.processors.Sequence([before, parts])
