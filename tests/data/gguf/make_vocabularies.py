"""Makes vocabularies.json: two small vocabularies, and what llama.cpp makes of texts by each.

    PYTHON_WITH_XLLAMACPP tests/data/gguf/make_vocabularies.py

It needs xllamacpp, tokenizers and gguf. The merges are trained on this repository's README; the
pieces have scores as sentencepiece writes them.
"""

import json
import pathlib
import sys
import tempfile

import gguf
import tokenizers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / 'benchmarks'))
from llama_library import Llama  # noqa: E402

TEXTS = [
    'Hello, world! It\'s 12345 and WE\'LL see: "quotes", (brackets) [and] {braces}...',
    'def f(x):\n    return x**2 + 3.14159  # a comment\n\n\nif __name__ == "__main__":\n\tpass\n',
    'naïve café, Grüße aus Köln; Übergrößenträger; «Привет, мир» 你好，世界 こんにちは 안녕',
    '  leading, trailing  and   several    spaces \t tabs\n \n  \r\n mixed \n\n',
    '👩‍💻 🇪🇺 emoji ✓ ½ ² ³ ① Ⅷ ٣٤ १२ math: ∑ α≤β',
    "e\u0301 composed é; don\u2019t; I'M; they'Re; $100,000.00 a_b-c/d\\e@f.g <|end|> </s> <turn>",
    '1 22 333 4444 55555 1,234,567 0x1F 3e-5 v1.2.3 2026-11-28T08:24:12',
    '\u00a0nbsp\u2003em\u200bzero\ufeff\x00\x01control\x7f',
    '',
    ' ',
    '\n',
    'a',
]
CUTS = ('gpt-2', 'smollm', 'llama-bpe', 'qwen2', 'default')
SPECIAL = ['<|end|>', '<turn>']


def byte_level():
    """Tokens, types and merges."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False
    )
    readme = (HERE.parents[2] / 'README.md').read_text()
    trained.train_from_iterator([readme, '12 123 1234 99 2026 2027 éà'], trainer)
    model = json.loads(trained.to_str())['model']
    tokens = sorted(model['vocab'], key=model['vocab'].get) + SPECIAL
    merges = [' '.join(m) if isinstance(m, list) else m for m in model['merges']]
    return {'tokens': tokens, 'types': [1] * (len(tokens) - 2) + [3, 4], 'merges': merges}


def of_pieces():
    """Tokens, types and scores."""
    special = ['<unk>', '<s>', '</s>']
    in_bytes = [f'<0x{i:02X}>' for i in range(256)]
    words = [
        '▁the',
        '▁and',
        '▁world',
        '▁Hello',
        'Hello',
        '▁return',
        '▁comment',
        'lea',
        '▁leading',
        'spaces',
        '▁spaces',
    ]
    letters = sorted(
        {c for text in (*TEXTS[:2], *words) for c in text if c not in ' \n\t'} | {'▁', 'é', 'ü'}
    )
    merged = {w[:i] for w in words for i in range(2, len(w) + 1)}
    merged |= {w[i:] for w in words for i in range(len(w) - 1) if len(w) - i < 4}
    merged = sorted(merged | {'▁▁', '▁▁▁▁', '▁t', 'th', 'he', 'er', 'in', '▁a'}, key=len)
    tokens = [*special, *in_bytes, *merged, *letters, '<turn>']
    types = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters)) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))] + [0.0]
    return {'tokens': tokens, 'types': types, 'scores': scores}


def answers(vocabulary, folder, **entries):
    """The ids of all texts by llama.cpp."""
    path = pathlib.Path(folder) / 'vocabulary.gguf'
    w = gguf.GGUFWriter(path, 'llama')
    for name in ('context_length', 'embedding_length', 'block_count', 'feed_forward_length'):
        w.add_uint32(f'llama.{name}', 32)
    w.add_uint32('llama.attention.head_count', 1)
    w.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    w.add_token_list(vocabulary['tokens'])
    w.add_token_types(vocabulary['types'])
    if 'merges' in vocabulary:
        w.add_token_merges(vocabulary['merges'])
    else:
        w.add_token_scores(vocabulary['scores'])
    for name, value in entries.items():
        add = w.add_bool if isinstance(value, bool) else w.add_string
        add(f'tokenizer.ggml.{name}', value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return [Llama(path, vocab_only=True).tokenize(text) for text in TEXTS]


with tempfile.TemporaryDirectory() as folder:
    words, pieces = byte_level(), of_pieces()
    made = {
        'texts': TEXTS,
        'words': words,
        'pieces': pieces,
        'ids': {cut: answers(words, folder, model='gpt2', pre=cut) for cut in CUTS}
        | {
            'pieces': answers(pieces, folder, model='llama', add_space_prefix=False),
            'pieces with a space': answers(pieces, folder, model='llama', add_space_prefix=True),
        },
    }
(HERE / 'vocabularies.json').write_text(json.dumps(made, separators=(',', ':')) + '\n')
