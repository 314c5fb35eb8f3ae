"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from layercomb import paths
from layercomb.errors import UsageError
from layercomb.launcher import calibration, compile_cache, others
from layercomb.launcher.finetuning import options as finetuning
from layercomb.launcher.training import devices
from layercomb.version import __version__

if TYPE_CHECKING:
    from layercomb.model import Model
    from layercomb.supervised.decoding.drafts import Speculation


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message}: see {self.prog} --help')


def parser(commands: Mapping[str, Callable[[argparse.Namespace], None]]) -> argparse.ArgumentParser:
    """Makes the parser of the command line.

    Args:
      commands: name -> the function that runs the command; its docstring must be
        ``COMMAND ARGUMENTS: help``.

    Returns:
      A parser; in what it parses, ``run`` is the command's function.
    """
    made = _Parser(
        prog='layercomb', description='Trains and uses models that gin configurations describe.'
    )
    made.add_argument('--version', action='version', version=f'layercomb {__version__}')
    subparsers = made.add_subparsers(required=True, metavar='COMMAND')

    def command(name: str, first: str, first_help: str) -> Any:
        return _command(subparsers, name, commands[name], first, first_help)

    def of_model(name: str) -> Any:
        add = command(name, 'source', _A_MODEL)
        add(
            '--checkpoint',
            default='last',
            metavar='last|best|STEP',
            help="which of a run's checkpoints: best is that of train.keep_best (%(default)s)",
        )
        return add

    a_config = 'a .gin file, or the name of a configuration that comes with the library'
    add = command('train', 'config', a_config)
    add('--output_dir', help='where the run is kept; by default runs/NAME')
    _training_options(add)
    add = command('finetune', 'source', _TO_TRAIN)
    finetuning.options_of(add)
    _training_options(add)
    add = of_model('eval')
    add('--text', metavar='FILE', help='a file in UTF-8 to measure the model on')
    add('--window', type=int, help='tokens of the text that are read at once (at most 1024)')
    _bits_option(add)
    add = command('inspect', 'source', f'{a_config}, or {_A_MODEL}')
    _kv_cache_option(add)
    devices.mesh_option(add, 'what a step of training takes on each of several devices')
    devices.offload_option(add, 'what it takes with blocks in host memory too')
    _generate_options(of_model('generate'))
    add = of_model('chat')
    add('--system', help='what the model is told before the first turn')
    add('--n_tokens', type=int, default=512, help='of an answer, at most (%(default)s)')
    _sampling_options(add, 'what its makers advise, else ')
    _draft_options(add)
    _serve_options(of_model('serve'))
    add = of_model('export')
    add('out', help='a directory, new or empty')
    add('--batch_size', type=int, default=1, help='rows that the decode step takes')
    add('--max_len', type=int, help="positions that its caches hold; by default the model's")
    add = of_model('convert')
    add('out', help='a .gguf file, or a directory for Hugging Face, new or empty')
    add('--dtype', help='of the weights: float32, float16 or bfloat16; in a .gguf also q8_0, q4_0')
    add('--adapter', action='store_true', help='write the adapter of the model alone, for PEFT')
    add('--base', default='', help='with --adapter: the name by which PEFT finds the model itself')
    return made


_A_MODEL = (
    'the output_dir of a run, a directory of Hugging Face, a .gguf file, a model.pkl.gz of Trax, '
    'or smollm2 or minilm, which packages carry'
)


_TO_TRAIN = 'a directory of Hugging Face, a .gguf file, or smollm2, which a package carries'


def _command(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    first: str,
    first_help: str,
) -> Any:
    """Adds a command with the arguments that all commands have: first one, bindings, cache.

    Returns:
      A function that adds a further argument to it.
    """
    about = (run.__doc__ or '').partition(': ')[2]
    sub = subparsers.add_parser(name, help=about, description=about)
    sub.add_argument(first, help=first_help)
    sub.add_argument(
        '--gin_param',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help="a binding that goes before the file's, e.g. 'train.steps=100'; may be repeated",
    )
    sub.add_argument(
        '--no_compile_cache',
        action='store_true',
        help=f'compile anew; else compiled programs are kept in {_cache()}, where the next '
        'command finds them',
    )
    sub.set_defaults(run=run)
    return sub.add_argument


def _cache() -> str:
    """The folder of compiled programs, as help shows it."""
    return _shown(os.environ.get('JAX_COMPILATION_CACHE_DIR') or compile_cache.folder(os.environ))


def _shown(folder: str | Path | None) -> str:
    """A cache folder, as help shows it."""
    return paths.shown(str(folder or 'no folder, for want of a home')).replace('%', '%%')


# The options of `sampling` and their defaults.
_SAMPLING: dict[str, Any] = {
    'temperature': 0.8,
    'top_k': None,
    'top_p': None,
    'repetition_penalty': 1.0,
    'seed': 0,
}


def sampling(
    options: argparse.Namespace, advised: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sampling arguments of `decoding.stream`.

    Args:
      options: of the command ``generate`` or ``chat``.
      advised: defaults that a model's makers give, by the same names.

    Returns:
      'temperature', 'top_k', 'top_p', 'repetition_penalty' and 'rng', a seed.

    Raises:
      UsageError: if an option of sampling or of drafts is given together with ``--beams``, which
        draws nothing.
    """
    given = {name: getattr(options, name) for name in _SAMPLING}
    drafts = {name: getattr(options, name, None) for name in ('draft', 'speculate')}
    said = sorted(name for name, value in {**given, **drafts}.items() if value is not None)
    if said and getattr(options, 'beams', None) is not None:
        raise UsageError(f'--beams searches and draws nothing: leave out --{" and --".join(said)}')
    defaults = {**_SAMPLING, **(advised or {})}
    chosen = {name: defaults[name] if x is None else x for name, x in given.items()}
    return {'rng' if name == 'seed' else name: x for name, x in chosen.items()}


def speculation(options: argparse.Namespace, load: Callable[[str], Model]) -> Speculation | None:
    """How tokens are drafted; None if nothing was said of it.

    Args:
      options: of the command ``generate``, ``chat`` or ``serve``.
      load: makes the draft's model from what was given as ``--draft``.
    """
    from layercomb.supervised import decoding

    n_draft = {} if options.speculate is None else {'n_draft': options.speculate}
    if options.draft is not None:
        return decoding.Draft(load(options.draft), **n_draft)
    return decoding.Lookup(**n_draft) if n_draft else None


def _n_draft(given: str) -> int:
    """The number of tokens of a draft, within the bounds of `decoding.Lookup`."""
    if not given.isdigit() or not 1 <= int(given) <= 64:
        raise argparse.ArgumentTypeError(f'a draft has 1 to 64 tokens, got {given!r}')
    return int(given)


def api_key(options: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """The key that requests must send: that of the option, or else of the environment.

    Args:
      options: of the command ``serve``.
      environment: variables; an empty one is a key that was forgotten, and is refused as such.

    Raises:
      UsageError: if it is no key.
    """
    from layercomb.serving import access

    given = environment.get(access.VARIABLE) if options.api_key is None else options.api_key
    try:
        return access.checked_key(given)
    except ValueError as e:
        where = access.VARIABLE if options.api_key is None else '--api_key'
        raise UsageError(f'{where}: {e}') from None


def adapters(options: argparse.Namespace, name: str) -> dict[str, str]:
    """The directories of adapters by their names.

    Args:
      options: of the command ``serve``.
      name: of the model itself, which no adapter may have.

    Raises:
      UsageError: for one that is not NAME=DIR, and for names that are there twice.
    """
    made: dict[str, str] = {}
    for given in options.adapter:
        its, _, directory = given.partition('=')
        if not its or not directory:
            raise UsageError(f'--adapter {given}: write NAME=DIR, such as poems=runs/poems')
        if its in made or its == name:
            said = 'is the model itself' if its == name else 'is there twice'
            raise UsageError(f'--adapter {given}: {its!r} {said}: choose another name')
        made[its] = directory
    return made


def check_convert(options: argparse.Namespace) -> None:
    """Raises a UsageError for options of ``convert`` that mean nothing together."""
    if options.adapter and options.dtype is not None:
        raise UsageError('--adapter writes float32: leave out --dtype')
    if options.base and not options.adapter:
        raise UsageError('--base is the base of an adapter: give --adapter too, or leave it out')


def _generate_options(add: Any) -> None:
    add('-', dest='stdin', action='store_true', help='continue what standard input says')
    add('--prompt', help='what to continue; an encoder-decoder reads it, and answers')
    add('--prompt_file', help='a file in UTF-8 to continue, or to read and answer')
    add('--n_tokens', type=int, default=300, help='how many tokens to make (%(default)s)')
    _sampling_options(add, 'what its makers advise, else ')
    _draft_options(add)
    add('--beams', type=int, help='search for the likeliest text among so many, instead of drawing')


def _sampling_options(add: Any, advised: str = '') -> None:
    temperature, penalty = _SAMPLING['temperature'], _SAMPLING['repetition_penalty']
    add(
        '--temperature',
        type=float,
        help=f'0 takes the likeliest token ({advised}{temperature})',
    )
    add('--top_k', type=int, help='draw among the k likeliest')
    add('--top_p', type=float, help='draw among the likeliest that reach p together')
    add(
        '--repetition_penalty',
        type=float,
        help=f'above 1, less of what was there ({advised}{penalty})',
    )
    add('--seed', type=int, help=f'of the sample ({_SAMPLING["seed"]})')
    _bits_option(add)
    _kv_cache_option(add)


def _draft_options(add: Any, when: str = '') -> None:
    add(
        '--speculate',
        type=_n_draft,
        metavar='N',
        help='draft N tokens and check them in one pass of the model, for the same text sooner '
        f'where it repeats what was there{when}; 7 suits most of it',
    )
    add(
        '--draft',
        metavar='MODEL',
        help='a smaller model with the same vocabulary that makes the drafts; else they are '
        'looked up in the text',
    )


def _training_options(add: Any) -> None:
    """Adds what may be said of one start of a run, and is no part of its configuration."""
    add(
        '--max_hours',
        type=_hours,
        metavar='H',
        help='save and end, with exit code 0, so many hours after the command started: 0.5 is half '
        'an hour; the step at hand is finished, and the same command goes on',
    )
    add(
        '--profile',
        type=_steps,
        metavar='FIRST:LAST',
        help='trace these steps, 10:20, into the run, for TensorBoard and Perfetto',
    )
    devices.options_of(add)
    add(
        '--allow_changes',
        default='',
        metavar='NAME,…',
        help='what may differ from the run so far: model, loss, optimizer, trainable, '
        'data, batch_size, seed, or all',
    )


def _hours(given: str) -> float:
    """Hours, above 0."""
    try:
        hours = float(given)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f'{given!r} are no hours above 0: write e.g. 1.5')
    return hours


def _steps(given: str) -> tuple[int, int]:
    """The first and the last of some steps."""
    found = re.fullmatch(r'([0-9]+):([0-9]+)', given)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(
            f'{given!r} is no first and last step, from 1 on and in order: write e.g. 10:20'
        )
    return first, last


def _bits_option(add: Any) -> None:
    add('--bits', type=int, choices=(16, 8, 4), help='narrow weights, of so many bits')
    folder = compile_cache.weights_folder(os.environ)
    add(
        '--no_weight_cache',
        action='store_true',
        default=None,
        help='read weights anew; else those that are laid out or narrowed for this machine are '
        f'kept in {_shown(folder)}, and the next command maps them from there',
    )
    calibration.option(add)


def _kv_cache_option(add: Any) -> None:
    add(
        '--kv_cache',
        choices=tuple(others.KV_CACHES),
        help='keep keys and values of the text in 16 or 8 bits, in half or a bit more than a '
        "quarter of the memory that they take without it, in the activations' dtype",
    )


def _serve_options(add: Any) -> None:
    add(
        '--host',
        default='127.0.0.1',
        help='the address to listen on; 0.0.0.0 for all (%(default)s)',
    )
    add(
        '--allowed_hosts',
        default='',
        metavar='NAME[,NAME…]',
        help='further names under which it answers, such as that of a proxy, '
        'as a browser sends them; * for any',
    )
    add(
        '--api_key',
        metavar='KEY',
        help='what requests must send as Authorization: Bearer KEY; other users of this machine '
        'see options, so better set it as LAYERCOMB_API_KEY in the environment',
    )
    add(
        '--adapter',
        action='append',
        default=[],
        metavar='NAME=DIR',
        help='an adapter of PEFT, or the output_dir of a run that trained one, which requests '
        'choose as the model NAME; may be repeated',
    )
    add('--port', type=int, default=8000, help='0 takes a free one (%(default)s)')
    add('--max_tokens', type=int, default=1024, help='that a request may ask for (%(default)s)')
    add('--max_prompt', type=int, default=8192, help='tokens of a prompt, at most (%(default)s)')
    add('--max_concurrent', type=int, default=8, help='choices decoded at once (%(default)s)')
    add(
        '--max_queue',
        type=int,
        default=64,
        help='requests that may wait for their turn (%(default)s)',
    )
    _draft_options(add, ', while one choice is decoded alone')
    _bits_option(add)
    _kv_cache_option(add)
