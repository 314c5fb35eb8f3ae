"""`Config`: a config.json that knows which of its entries have been understood."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from layercomb.errors import UsageError

_MISSING = object()
_LARGEST = 1e300  # of any number; integers in JSON may be larger than a float holds
# Entries that say nothing about what a model computes for given token ids.
_ABOUT = frozenset((
    'architectures', 'model_type', 'torch_dtype', 'dtype', 'transformers_version', 'use_cache',
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'sep_token_id', 'cls_token_id', 'unk_token_id',
    'mask_token_id', 'decoder_start_token_id', 'forced_eos_token_id', 'forced_bos_token_id',
    'initializer_range', 'initializer_factor', 'init_std',
    'encoder_layerdrop', 'decoder_layerdrop', 'pretraining_tp', 'gradient_checkpointing',
    'attention_dropout', 'hidden_dropout', 'hidden_dropout_prob', 'attention_probs_dropout_prob',
    'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'dropout', 'dropout_rate', 'activation_dropout',
    'classifier_dropout', 'classifier_dropout_prob', 'classif_dropout', 'task_specific_params',
    'name_or_path', 'id2label', 'label2id', 'problem_type', 'finetuning_task', 'tokenizer_class',
    'output_attentions', 'output_hidden_states', 'return_dict', 'keys_to_ignore_at_inference',
    'max_length', 'min_length', 'num_beams', 'early_stopping', 'no_repeat_ngram_size',
    'length_penalty', 'bad_words_ids', 'prefix', 'is_llama_config', 'transformers.js_config',
    # How texts are made, in configurations of the time before generation_config.json.
    'do_sample', 'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty',
    'num_return_sequences', 'num_beam_groups', 'diversity_penalty', 'suppress_tokens',
    'cache_implementation',
    # How the makers saved it, and by what.
    'output_past', 'xla_device', 'save_step', 'unsloth_fixed', 'unsloth_version',
))  # fmt: skip


class Config(Mapping[str, Any]):
    """A configuration, which records what has been read of it.

    What a family never asked for is refused by `check_read`: a model that ignores an entry it does
    not know computes something else, silently.

    Args:
      entries: the content of a config.json.
      file: its name, for messages.
    """

    def __init__(self, entries: Mapping[str, Any], file: str = 'config.json') -> None:
        self._entries = dict(entries)
        self._file = file
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        if name not in self._entries:
            raise UsageError(
                f'{self._file} has no {name!r}: take the file that came with the model'
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def or_else(self, defaults: Mapping[str, Any]) -> Config:
        """The same configuration with entries for what is missing; reading one reads both.

        Args:
          defaults: entries by name.
        """
        made = Config({**defaults, **self._entries}, self._file)
        made._read = self._read
        return made

    def inside(self, name: str) -> Config:
        """An entry that is a configuration itself.

        Raises:
          UsageError: if it is missing, or no object.
        """
        value = self[name]
        if not isinstance(value, dict):
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60} and not an object: take the file that '
                'came with the model'
            )
        return Config(value, self._file)

    def get(self, name: str, default: Any = None) -> Any:
        """An entry; the default if it is missing or null."""
        self._read.add(name)
        value = self._entries.get(name)
        return default if value is None else value

    def count(self, name: str, default: Any = _MISSING) -> int:
        """An entry that is a positive integer.

        Args:
          name: of the entry.
          default: its value where it is missing; by default it must be there.

        Raises:
          UsageError: if it is missing without default, or no positive integer.
        """
        value = self[name] if default is _MISSING else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60} and not a positive integer: take the '
                'file that came with the model'
            )
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        """An entry that is a finite number.

        Args:
          name: of the entry.
          default: its value where it is missing; by default it must be there.

        Raises:
          UsageError: if it is missing without default, or something else.
        """
        value = self[name] if default is _MISSING else self.get(name, default)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not abs(value) < _LARGEST:  # NaN is less than nothing
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60} and no finite number: take the file that '
                'came with the model'
            )
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """An entry that is true or false.

        Args:
          name: of the entry.
          default: its value where it is missing.

        Raises:
          UsageError: if it is something else.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60} and not true or false: take the file '
                'that came with the model'
            )
        return value

    def one_of(self, name: str, known: Mapping[str, Any], default: str) -> Any:
        """What an entry, a word, stands for.

        Args:
          name: of the entry.
          known: the words that are understood, and what they stand for.
          default: the word where it is missing.

        Raises:
          UsageError: for another word, listing those known.
        """
        value = self.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60}, and known are {", ".join(known)}: this '
                'model cannot be loaded'
            )
        return known[value]

    def must_be(self, name: str, *allowed: Any) -> None:
        """Checks an entry that may say one thing only; a missing one is right.

        Args:
          name: of the entry.
          *allowed: values that are understood.

        Raises:
          UsageError: if it is another value.
        """
        value = self.get(name)
        if value is not None and value not in allowed:
            raise UsageError(
                f'{self._file}: {name!r} is {value!r:.60}, and only {allowed[0]!r} is understood: '
                'this model cannot be loaded'
            )

    def check_read(self, family: str) -> None:
        """Checks that every entry was asked for, or cannot change what the model computes.

        Args:
          family: the name of the family, for the message.

        Raises:
          UsageError: for an entry that is neither known nor neutral.
        """
        for name, value in self._entries.items():
            known = name in self._read or name in _ABOUT or name.startswith('_')
            if known or value is None or (value is not True and value in (0, 1, [], {}, '')):
                continue
            near = difflib.get_close_matches(name, self._read, 1)
            guess = f' (did it mean {near[0]!r}?)' if near else ''
            raise UsageError(
                f'{self._file} says {name!r}: {value!r:.60}, which is unknown for {family}{guess}: '
                'remove it if it does not change what the model computes'
            )
