"""Toy tokenizers with templates, and conversations in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from layercomb import data
from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate
from layercomb.interop.tokenizer import PretrainedTokenizer

GPT2 = Path(__file__).parents[1] / 'pretrained' / 'gpt2'
CHATML = ChatTemplate((GPT2 / 'chat_template.jinja').read_text())


def gpt2(template=CHATML):
    """The byte-level tokenizer of the tiny model, whose <|im_end|> ends answers."""
    backend = tokenizers.Tokenizer.from_file(str(GPT2 / 'tokenizer.json'))
    end = backend.token_to_id('<|im_end|>')
    return PretrainedTokenizer(backend, eos_id=end, bos_id=0, chat=template)


GPT2_CHAT = gpt2()


def words(template=None, bos=False, **more):
    """A tokenizer of words, of which '.' ends answers; with `bos` it begins texts with '<s>'."""
    known = ['<s>', '.', 'U', 'B', 'S', 'a', 'b', 'c', 'd', 'e', 'x']
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, 'x'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            '<s> $A', special_tokens=[('<s>', 0)]
        )
    chat = None if template is None else ChatTemplate(template)
    return PretrainedTokenizer(backend, eos_id=1, bos_id=0, chat=chat, **more)


TURNS = (
    "{% for m in messages %}{{ {'user': 'U', 'assistant': 'B', 'system': 'S'}[m.role] }}"
    ' {{ m.content }} . {% endfor %}{% if add_generation_prompt %}B {% endif %}'
)
LATEST = TURNS.replace(
    '{{ m.content }}',
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('x')[-1] }}"
    '{% else %}{{ m.content }}{% endif %}',
)


def user(content):
    return {'role': 'user', 'content': content}


def bot(content, **more):
    return {'role': 'assistant', 'content': content, **more}


def told(messages, tokenizer=None, **more):
    """The words of a conversation, those that are learnt in brackets."""
    tokenizer = tokenizer or words(TURNS)
    return marked(data.chat([{'messages': messages}], tokenizer, **more)[0], tokenizer)


def marked(document, tokenizer):
    ids, weights = document
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and ids.shape == weights.shape
    names = [tokenizer.vocabulary.backend.id_to_token(int(i)) for i in ids]
    return ' '.join(f'[{n}]' if w else n for n, w in zip(names, weights, strict=True))


def refused(row, cause, function=data.chat, tokenizer=None):
    with pytest.raises(UsageError, match=cause) as e:
        list(function([row], tokenizer or words(TURNS)))
    assert '\n' not in str(e.value) and str(e.value).startswith('source[0]')
