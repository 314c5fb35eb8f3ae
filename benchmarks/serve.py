"""Eight clients at once against one, and the first token behind a prompt that was read before.

    python benchmarks/serve.py [--bits 32 8 4] [--clients 8] [--tokens 128] [--source NAME]

Without a source: SmolLM2-135M's shape (30 layers, d_model 576, d_ff 1536, 9 heads, vocabulary
49,152) as a `TransformerLM`, with random weights. The engine is used as the server uses it, without
HTTP: each client is a completion, greedy, that begins with a prompt of its own of 16 tokens.

* throughput: tokens a second, all clients together, from the first request to the last token. One
  client and all of them take turns, and the fastest turn of each counts. CPU seconds are those of
  all threads; unlike the others they hardly depend on what else the machine does.
* prefix: the time to the first token of a request with 1,000 tokens in common with the one before,
  and 16 of its own, against the time of the first such request. Each turn has another prompt.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from machine import describe

VOCAB, D_MODEL, D_FF, LAYERS, HEADS, MAX_LEN = 49152, 576, 1536, 30, 9, 2048
SHARED, OWN = 1000, 16


class Numbers:
    """A tokenizer whose text is the ids."""

    vocab_size, eos_id = VOCAB, 0

    def encode(self, text):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids):
        return ''.join(f'{i} ' for i in ids)


def model_of(source, bits):
    """A model and its tokenizer: of a source, or of random weights."""
    import layercomb as lc
    from layercomb import models, transforms

    if source is not None:
        from layercomb import interop
        from layercomb.launcher import sources

        model, tokenizer = interop.load(sources.find(source).path, dtype='float32')
    else:
        net = models.TransformerLM(VOCAB, D_MODEL, D_FF, LAYERS, HEADS, MAX_LEN)
        model, tokenizer = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32')), Numbers()
    if bits < 32:
        narrow = transforms.quantize(model.layer, model.weights, bits=bits)
        model = lc.Model(*narrow, model.state)
    return model, tokenizer


class Clients:
    """Requests to one engine, with prompts that were never read before."""

    def __init__(self, engine, vocab_size):
        self.engine, self.vocab_size = engine, vocab_size
        self.drawn = np.random.default_rng(0)

    def prompt(self, length):
        return tuple(self.drawn.integers(1, self.vocab_size, length).tolist())

    def request(self, prompt, n_tokens):
        from layercomb.serving.protocol import Request
        from layercomb.supervised.decoding import Sampler

        return Request((prompt,), n_tokens, sampling=Sampler(0.0), logprobs=None)

    def tokens_per_second(self, n_clients, n_tokens):
        """Of all clients together, and tokens a CPU second of all threads."""
        requests = [self.request(self.prompt(OWN), n_tokens) for _ in range(n_clients)]
        started, cpu = time.perf_counter(), time.process_time()
        running = [self.engine.run(request) for request in requests]
        for each in running:
            for _ in each:
                pass
        taken, cpu = time.perf_counter() - started, time.process_time() - cpu
        return np.array([1 / taken, 1 / cpu]) * sum(each.n_made for each in running)

    def first_token(self, prompt):
        """Seconds to the first token, and how many tokens of the prompt were known."""
        started = time.perf_counter()
        running = self.engine.run(self.request(prompt, 1))
        for _ in running:
            break
        return time.perf_counter() - started, running.n_cached


def throughput(clients, n_clients, n_tokens, turns):
    """The best figures of one client and of all, in turns."""
    best = {1: np.zeros(2), n_clients: np.zeros(2)}
    for _ in range(turns + 1):  # the first compiles
        for n in best:
            best[n] = np.maximum(best[n], clients.tokens_per_second(n, n_tokens))
    return best[1], best[n_clients]


def prefix(clients, turns):
    """The best times to the first token, of the first and the second request."""
    first, second, known = [], [], 0
    for _ in range(turns + 1):
        shared = clients.prompt(SHARED)
        first.append(clients.first_token(shared + clients.prompt(OWN))[0])
        taken, known = clients.first_token(shared + clients.prompt(OWN))
        second.append(taken)
    return min(first[1:]), min(second[1:]), known


def measure(options, bits):
    from layercomb.serving.engine import Engine
    from layercomb.serving.limits import Limits

    model, tokenizer = model_of(options.source, bits)
    limits = Limits(max_concurrent=options.clients, same_program=options.same_program)
    engine = Engine(model, tokenizer, limits)
    clients = Clients(engine, VOCAB if options.source is None else engine.vocab_size)
    one, many = throughput(clients, options.clients, options.tokens, options.turns)
    for what, a, b in zip(('s', 'CPU s'), one, many, strict=True):
        together = f'{options.clients} clients {b:6.1f}: {b / a:.1f}x'
        print(f'{bits:>2} bits: 1 client {a:6.1f} tokens/{what}, {together}')
    first, second, known = prefix(clients, options.turns)
    print(
        f'{bits:>2} bits: first token behind {SHARED} + {OWN} tokens {first * 1e3:7.1f} ms, with '
        f'{known} known {second * 1e3:6.1f} ms: {first / second:.1f}x sooner',
        flush=True,
    )
    engine.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--bits', type=int, nargs='+', default=[32, 8, 4])
    parser.add_argument('--clients', type=int, default=8)
    parser.add_argument('--tokens', type=int, default=128)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--source', help='a directory, file or name, as the launcher takes them')
    parser.add_argument('--same_program', action='store_true', help='see serving.Limits')
    options = parser.parse_args()
    print(describe('jaxlib', 'numpy'))
    what = options.source or f'{LAYERS} layers, d_model {D_MODEL}, {VOCAB} tokens, random weights'
    print(f'{what}; {options.tokens} tokens a client; best of {options.turns} turns')
    for bits in options.bits:
        measure(options, bits)


if __name__ == '__main__':
    main()
