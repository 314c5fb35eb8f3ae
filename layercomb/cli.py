"""The launcher: ``layercomb train | eval | generate | inspect``. The only file that imports gin.

A configuration says ``from layercomb import cli`` and binds the arguments of `train`. Whatever a
person got wrong ends with exit code 2 and one line of cause and cure; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.resources
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layercomb.errors import UsageError, of_the_machine, require
from layercomb.version import __version__

CONFIG = 'config.gin'
OPERATIVE = 'operative_config.gin'
# What may change between the parts of one run: how long it is, and what is shown of it.
_MAY_CHANGE = re.compile(
    r'cli\.train\.(steps|keep|\w+_every|eval_tasks|sample_\w+|baseline_text)$|.*EvalTask\.'
)


def train(
    model: Any,
    train_task: Any,
    eval_tasks: Sequence[Any] = (),
    *,
    steps: int = 1000,
    seed: int = 0,
    eval_every: int | None = 500,
    checkpoint_every: int | None = 500,
    log_every: int = 10,
    keep: int = 3,
    tokenizer: Any = None,
    sample_prompt: str | None = None,
    sample_tokens: int = 300,
    sample_temperature: float = 0.8,
    baseline_text: Any = None,
) -> Any:
    """What a configuration binds: the fields of an `Experiment`, which it returns."""
    from layercomb.experiment import Experiment

    tasks = eval_tasks if isinstance(eval_tasks, (tuple, list)) else (eval_tasks,)
    return Experiment(
        model=model,
        train_task=train_task,
        eval_tasks=tuple(tasks),
        steps=steps,
        seed=seed,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        keep=keep,
        tokenizer=tokenizer,
        sample_prompt=sample_prompt,
        sample_tokens=sample_tokens,
        sample_temperature=sample_temperature,
        baseline_text=baseline_text,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the launcher.

    Args:
      arguments: as on the command line, without the program's name.

    Returns:
      The exit code: 0, or 2 for what a person can put right.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UsageError as e:
        print(f'layercomb: {_one_line(e)}', file=sys.stderr)  # gin adds lines of its own
        return 2
    except KeyboardInterrupt:
        print(
            'layercomb: stopped; the same command goes on from the last checkpoint', file=sys.stderr
        )
        return 130
    return 0


def run_train(options: argparse.Namespace) -> None:
    """``layercomb train CONFIG``: trains, or goes on training, and shows what came out."""
    from layercomb.supervised import Loop

    source = find_config(options.config)
    directory = Path(options.output_dir or Path('runs') / source.stem)
    with configured(_read(source), options.gin_param, source.name) as config:
        experiment = config.build()
        _check_directory(directory, config.text)
        with mistakes_of_the_person():
            experiment.check()  # before anything is written
            directory.mkdir(parents=True, exist_ok=True)
            config.write(directory)
            loop = Loop(
                experiment.model,
                experiment.train_task,
                experiment.eval_tasks,
                directory,
                seed=experiment.seed,
                eval_every=experiment.eval_every,
                checkpoint_every=experiment.checkpoint_every,
                log_every=experiment.log_every,
                keep=experiment.keep,
            )
        row = loop.run(experiment.steps)
        with of_the_machine('it is trained and saved; put that right, and run the same again'):
            _conclude(experiment, loop, row, directory)


def run_eval(options: argparse.Namespace) -> None:
    """``layercomb eval RUN_DIR``: measures a trained model, perhaps under other bindings."""
    from layercomb.supervised import evaluate
    from layercomb.supervised.checkpoints import latest_weights

    text = _run_config(options.run_dir)
    with configured(text, options.gin_param, options.run_dir) as config:
        experiment = config.build()
        with mistakes_of_the_person():
            experiment.check()
        if not experiment.eval_tasks:
            raise UsageError('the configuration measures nothing: bind train.eval_tasks')
        with mistakes_of_the_person():
            signature = experiment.batch_signature()[: experiment.model.n_in]
            weights, state = experiment.abstract(signature)
        weights, state, step = latest_weights(options.run_dir, weights, state)
        print(f'step {step}')
        for name, value in evaluate(
            experiment.model, weights, state, experiment.eval_tasks
        ).items():
            print(f'{name} {value:.6g}')


def run_generate(options: argparse.Namespace) -> None:
    """``layercomb generate RUN_DIR``: continues a prompt, to the terminal, as it is made."""
    from layercomb.model import Model
    from layercomb.shapes import shape_dtype
    from layercomb.supervised import decoding
    from layercomb.supervised.checkpoints import latest_weights

    prompt = _prompt(options)
    if not prompt:
        raise UsageError('the prompt is empty: give at least one character to continue')
    text = _run_config(options.run_dir)
    with configured(text, options.gin_param, options.run_dir) as config:
        net, tokenizer = config.value('model'), config.value('tokenizer')
        if tokenizer is None:
            raise UsageError('this run has no tokenizer, so it makes no text: bind train.tokenizer')
        with mistakes_of_the_person():
            model = Model(net)
            model.weights, model.state = _abstract(net, shape_dtype((1, 8), 'int32'))
        model.weights, model.state, _ = latest_weights(options.run_dir, model.weights, model.state)
        with mistakes_of_the_person():
            tokens = decoding.stream(
                model,
                [tokenizer.encode(prompt)],
                options.n_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                rng=options.seed,
                eos_id=tokenizer.eos_id,
            )
        print(prompt, end='', flush=True)
        _print_stream(tokens, tokenizer)


def run_inspect(options: argparse.Namespace) -> None:
    """``layercomb inspect CONFIG | RUN_DIR``: the model as a table, and what training it takes."""
    from layercomb.summary import summary

    if (Path(options.config) / CONFIG).is_file():
        text, name = _run_config(options.config), options.config
    else:
        source = find_config(options.config)
        text, name = _read(source), source.name
    with configured(text, options.gin_param, name) as config:
        experiment = config.build()
        with mistakes_of_the_person():
            signature = experiment.batch_signature()
            print(summary(experiment.model, signature[: experiment.model.n_in]))
            takes = experiment.training_bytes()
    print()
    print(f'a training step on a batch of {signature[0].shape} takes, in bytes:')
    for what, n in takes.items():
        print(f'  {what:<12}{n:>16,}')


class Config:
    """A parsed configuration, good while its context is open."""

    def __init__(self, gin: Any):
        self._gin = gin
        self.text: str = gin.config_str()

    def build(self) -> Any:
        """The experiment."""
        with mistakes_of_the_person():
            try:
                make = self._gin.get_configurable(train)
            except KeyError:
                raise UsageError(
                    'the configuration trains nothing: write "from layercomb import cli" and bind '
                    'cli.train.model and cli.train.train_task'
                ) from None
            return make()

    def write(self, directory: Path) -> None:
        """Keeps the bindings, by which runs are compared, and beside them all that is in force.

        The latter has what nobody bound, too: the defaults of everything built so far.
        """
        (directory / CONFIG).write_text(self.text, encoding='utf-8')
        (directory / OPERATIVE).write_text(self._gin.operative_config_str(), encoding='utf-8')

    def value(self, name: str) -> Any:
        """One argument of `train` alone, without building the others."""
        with mistakes_of_the_person():
            try:
                value = self._gin.query_parameter(f'cli.train.{name}')
            except ValueError:
                return None
            made = getattr(value, 'scoped_configurable_fn', None)
            return made() if made is not None else value


@contextlib.contextmanager
def configured(text: str, bindings: Sequence[str], name: str) -> Iterator[Config]:
    """Parses a configuration and then further bindings, such as ``train.steps=100``.

    Raises:
      UsageError: if something in it is unknown, or does not parse.
    """
    gin = require('gin', 'train')
    gin.clear_config(clear_constants=True)
    imports = '\n'.join(re.findall(r'^(?:from|import) .*$', text, re.MULTILINE))
    try:
        with _parsing(f'in {name}'):
            gin.parse_config(text)
        for binding in bindings:
            with _parsing(f'in --gin_param {binding!r}'):
                try:
                    gin.parse_config(binding)
                except ValueError:  # what the file does not mention is reached by its imports
                    if "doesn't have a parameter" in str(sys.exc_info()[1]):
                        raise
                    gin.parse_config(f'{imports}\n{binding}')
        gin.finalize()
        yield Config(gin)
    finally:
        gin.clear_config(clear_constants=True)


@contextlib.contextmanager
def _parsing(where: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f'{_one_line(e)} ({where}){_nearest(e)}') from e


@contextlib.contextmanager
def mistakes_of_the_person() -> Iterator[None]:
    """Turns errors of construction, where all values are a person's, into one line."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as e:
        notes = [n for n in getattr(e, '__notes__', ()) if n.startswith('in ')]
        where = f' ({", ".join(notes)})' if notes else ''
        raise UsageError(f'{_one_line(e)}{where}') from e


def find_config(name: str) -> Path:
    """A configuration by path, or by the name of one that comes with the library.

    Raises:
      UsageError: if there is none, listing those there are.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(importlib.resources.files('layercomb.gin_configs')))
    known = sorted(path.stem for path in folder.glob('*.gin'))
    stem = name.removesuffix('.gin')
    if stem in known:
        return folder / f'{stem}.gin'
    raise UsageError(
        f'no configuration {name!r}: give the path of a .gin file, or one of {", ".join(known)}'
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='layercomb', description='Trains and uses models that gin configurations describe.'
    )
    parser.add_argument('--version', action='version', version=f'layercomb {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def command(name: str, run: Any, first: str, first_help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__.split(': ', 1)[1], description=run.__doc__)
        sub.add_argument(first, help=first_help)
        sub.add_argument(
            '--gin_param',
            action='append',
            default=[],
            metavar='NAME=VALUE',
            help="a binding that goes before the file's, e.g. 'train.steps=100'; may be repeated",
        )
        sub.set_defaults(run=run)
        return sub

    a_config = 'a .gin file, or the name of a configuration that comes with the library'
    a_run = 'the output_dir of a run'
    sub = command('train', run_train, 'config', a_config)
    sub.add_argument('--output_dir', help='where the run is kept; by default runs/NAME')
    command('eval', run_eval, 'run_dir', a_run)
    command('inspect', run_inspect, 'config', f'{a_config}, or {a_run}')
    sub = command('generate', run_generate, 'run_dir', a_run)
    sub.add_argument('--prompt', help="what to continue; '-' reads standard input")
    sub.add_argument('--prompt_file', help='a file to continue')
    sub.add_argument('--n_tokens', type=int, default=300, help='how many tokens to make')
    sub.add_argument('--temperature', type=float, default=0.8, help='0 takes the likeliest token')
    sub.add_argument('--top_k', type=int, help='draw among the k likeliest')
    sub.add_argument('--top_p', type=float, help='draw among the likeliest that reach p together')
    sub.add_argument('--seed', type=int, default=0, help='of the sample')
    return parser


def _check_directory(directory: Path, text: str) -> None:
    """Raises UsageError unless a run may be kept in the directory: a new one, or this one."""
    there = directory / CONFIG
    if there.is_file():
        old, new = _bindings(there.read_text()), _bindings(text)
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if changed:
            raise UsageError(
                f'{str(directory)!r} holds another experiment ({changed[0]} is '
                f'{old.get(changed[0], "not bound")} there, {new.get(changed[0], "not bound")} '
                'here): choose another --output_dir, or delete it'
            )
    elif directory.exists() and not _is_empty(directory):
        raise UsageError(
            f'{str(directory)!r} is not empty and holds no run: choose another --output_dir'
        )


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _bindings(text: str) -> dict[str, str]:
    """What a configuration binds, without what may change between the parts of one run."""
    joined = re.sub(r'\\\n\s*', '', text)
    found = re.findall(r'^([\w./]+) = (.*(?:\n[ \t].*)*)', joined, re.MULTILINE)
    return {name: value for name, value in found if not _MAY_CHANGE.match(name)}


def _run_config(run_dir: str) -> str:
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise UsageError(
            f'{run_dir!r} holds no run ({CONFIG} is missing): give the output_dir of one'
        )
    return _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f'cannot read {str(path)!r} ({e}): check the path') from None


def _prompt(options: argparse.Namespace) -> str:
    if (options.prompt is None) == (options.prompt_file is None):
        raise UsageError("give either --prompt TEXT (or '-' for standard input) or --prompt_file")
    if options.prompt_file is None:
        return sys.stdin.read() if options.prompt == '-' else options.prompt
    return _read(Path(options.prompt_file))


def _abstract(net: Any, example: Any) -> tuple[Any, Any]:
    import jax

    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(lambda rng: net.init((example,), rng), key)


def _print_stream(tokens: Iterator[Any], tokenizer: Any) -> None:
    """Prints tokens as they come, and their speed on standard error."""
    decoder = tokenizer.incremental_decoder()
    started, n = time.perf_counter(), 0
    first = started
    for token in tokens:
        n += 1
        first = time.perf_counter() if n == 1 else first
        print(decoder.decode(token[:1]), end='', flush=True)
    print(decoder.decode([], final=True))
    seconds = time.perf_counter() - first
    speed = f', then {(n - 1) / seconds:.1f} tokens a second' if n > 1 else ''
    print(f'{n} tokens: the first after {first - started:.2f} s{speed}', file=sys.stderr)


def _conclude(experiment: Any, loop: Any, row: dict[str, Any], directory: Path) -> None:
    """Prints what a run came to: metrics, simple models beside it, a sample."""
    numbers = [f'{k} {v:.4g}' for k, v in row.items() if k != 'step']
    print(f'\nstep {row["step"]}: ' + ', '.join(numbers))
    if experiment.baseline_text is not None:
        from layercomb.data import witten_bell_bits_on_batches

        same_text = experiment.eval_tasks[0].batches()
        bits = witten_bell_bits_on_batches(experiment.baseline_text, same_text)
        orders = ' / '.join(map(str, bits))
        values = ' / '.join(f'{b:.2f}' for b in bits.values())
        print(f'beside it, Witten–Bell byte models of order {orders}: {values} bits per byte')
    if experiment.sample_prompt is not None:
        from layercomb.model import Model
        from layercomb.supervised import decoding

        model = Model(experiment.model, loop.weights, loop.state)
        tokenizer, prompt = experiment.tokenizer, experiment.sample_prompt
        tokens = decoding.generate(
            model,
            [tokenizer.encode(prompt)],
            experiment.sample_tokens,
            temperature=experiment.sample_temperature,
            eos_id=tokenizer.eos_id,
        )[0]
        print(f'\na sample:\n{prompt}{tokenizer.decode(tokens).rstrip(chr(0))}')
    print(f'\nkept in {directory}: report.png, metrics.jsonl, checkpoints, TensorBoard events')


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), '')
    return first or type(error).__name__


def _nearest(error: BaseException) -> str:
    """': did you mean …?' for a misspelt name of a module, a layer or a parameter."""
    text = str(error)
    if 'was not provided by an import' in text:
        return ': write the name in full, as the file does, e.g. models.TransformerLM'
    attribute = re.search(r"<module '([\w.]+)'.*> has no attribute (\w+)", text)
    if attribute is None:
        return ''
    names = [n for n in dir(sys.modules[attribute[1]]) if not n.startswith('_')]
    close = difflib.get_close_matches(attribute[2], names, n=3)
    return f': did you mean {" or ".join(close)}?' if close else f': there are {", ".join(names)}'
