"""llama.cpp by its C interface, out of the library that the wheel of `xllamacpp` carries.

The wheel's own interface is a server, which does not tell the scores of a prompt. Run by a Python
that has xllamacpp; nothing of layercomb is imported.

    python llama_library.py FILE.gguf REQUEST.json ANSWER.npz

REQUEST holds one of ``texts`` (to tokenize), ``windows`` (ids; the log-likelihood of each token
after the first), ``prompt`` and ``n_tokens`` (greedy, timed).
"""

import ctypes
import importlib.util
import json
import pathlib
import sys
import time

import numpy as np

WIDE = 4096  # bytes: more than any struct that is passed by value


class Params(ctypes.Structure):
    """A struct whose fields are not known, filled by llama.cpp itself."""

    _fields_ = (('words', ctypes.c_int32 * (WIDE // 4)),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ('n_tokens', ctypes.c_int32),
        ('token', ctypes.POINTER(ctypes.c_int32)),
        ('embd', ctypes.c_void_p),
        ('pos', ctypes.POINTER(ctypes.c_int32)),
        ('n_seq_id', ctypes.POINTER(ctypes.c_int32)),
        ('seq_id', ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ('logits', ctypes.POINTER(ctypes.c_int8)),
    )


def library():
    """The functions of llama.cpp."""
    folder = importlib.util.find_spec('xllamacpp').submodule_search_locations[0]
    lib = ctypes.CDLL(str(next(pathlib.Path(folder).glob('*.so'))), ctypes.RTLD_GLOBAL)
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, *arguments in (
        ('llama_model_default_params', Params),
        ('llama_context_default_params', Params),
        ('llama_model_load_from_file', pointer, ctypes.c_char_p, Params),
        ('llama_init_from_model', pointer, pointer, Params),
        ('llama_model_get_vocab', pointer, pointer),
        ('llama_vocab_n_tokens', number, pointer),
        ('llama_batch_init', Batch, number, number, number),
        ('llama_decode', number, pointer, Batch),
        ('llama_get_logits_ith', ctypes.POINTER(ctypes.c_float), pointer, number),
        ('llama_get_memory', pointer, pointer),
        ('llama_memory_clear', None, pointer, ctypes.c_bool),
        ('llama_tokenize', number, pointer, ctypes.c_char_p, number,
         ctypes.POINTER(number), number, ctypes.c_bool, ctypes.c_bool),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    quiet = ctypes.CFUNCTYPE(None, number, ctypes.c_char_p, pointer)(lambda *_: None)
    lib.quiet = quiet  # kept, or the callback would be freed
    lib.llama_log_set(quiet, None)
    lib.llama_backend_init()
    return lib


class Llama:
    """A model.

    Args:
      path: of a .gguf file.
      n_ctx: positions of its cache.
      n_threads: of the computation.
      vocab_only: whether there is only a tokenizer to read.
    """

    def __init__(self, path, n_ctx=1024, n_threads=2, vocab_only=False):
        self.lib = library()
        params = self.lib.llama_model_default_params()
        if vocab_only:
            flags = (ctypes.c_int8 * 8).from_buffer(params, 72)
            assert list(flags[:3]) == [0, 0, 1], list(flags)  # vocab_only, check_tensors, …
            flags[0] = 1
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f'llama.cpp does not read {path}')
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.vocab)
        self.n_ctx, self.n_threads, self.context = n_ctx, n_threads, None

    def _start(self):
        if self.context is None:
            params = self.lib.llama_context_default_params()
            # n_ctx, n_batch, n_ubatch, n_seq_max are the first fields, then the threads.
            defaults = list(params.words[:4])
            assert defaults[1:3] == [2048, 512], defaults
            params.words[0:3] = [self.n_ctx] * 2 + [512]
            at = next(i for i in range(3, 12) if params.words[i] == params.words[i + 1] > 1)
            params.words[at : at + 2] = [self.n_threads] * 2
            self.context = self.lib.llama_init_from_model(self.model, params)
            self.batch = self.lib.llama_batch_init(self.n_ctx, 0, 1)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def tokenize(self, text, special=True):
        """The ids of a text, without those that begin or end it."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        return list(room[:n])

    def _decode(self, ids, first, every):
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or i == len(ids) - 1
        if self.lib.llama_decode(self.context, batch) != 0:
            raise SystemExit('llama.cpp cannot decode')

    def _logits(self, i):
        return np.ctypeslib.as_array(
            self.lib.llama_get_logits_ith(self.context, i), (self.n_vocab,)
        )

    def log_likelihoods(self, ids):
        """log p of each token after the first, given those before it."""
        self._start()
        self._decode(ids[:-1], 0, True)
        made = []
        for i, target in enumerate(ids[1:]):
            x = self._logits(i).astype(np.float64)
            made.append(x[target] - x.max() - np.log(np.exp(x - x.max()).sum()))
        return np.array(made)

    def greedy(self, ids, n):
        """The next n tokens, and the seconds that each took."""
        self._start()
        self._decode(ids, 0, False)
        made, times, at = [], [], len(ids)
        token = int(self._logits(len(ids) - 1).argmax())
        for _ in range(n):
            made.append(token)
            start = time.perf_counter()
            self._decode([token], at, False)
            token = int(self._logits(0).argmax())
            times.append(time.perf_counter() - start)
            at += 1
        return made, times


def main(path, request, answer):
    """Answers one request."""
    asked = json.loads(pathlib.Path(request).read_text())
    model, made = Llama(path, asked.get('n_ctx', 1024)), {}
    if 'texts' in asked:
        made['ids'] = np.concatenate([[-1, *model.tokenize(t)] for t in asked['texts']])
    if 'windows' in asked:
        made['scores'] = np.stack([model.log_likelihoods(ids) for ids in asked['windows']])
    if 'prompt' in asked:
        made['tokens'], made['times'] = model.greedy(asked['prompt'], asked['n_tokens'])
    np.savez(answer, **made)


if __name__ == '__main__':
    main(*sys.argv[1:])
