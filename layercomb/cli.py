"""The launcher: ``layercomb train | finetune | eval | inspect | generate | chat | serve | …``.

This is the only file that imports gin. It hands trained models and tokenizers to the others.

A configuration says ``from layercomb import cli`` and binds the arguments of `train`. A mistake of
the user ends with exit code 2 and one line of cause and cure; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercomb import parallel, paths
from layercomb.errors import UsageError, machine_errors, one_line, require, usage_errors
from layercomb.launcher import (
    adapters,
    arguments,
    calibration,
    compile_cache,
    configurations,
    others,
    runs,
    sources,
    terminal,
)
from layercomb.launcher.configurations import Config, find_config
from layercomb.launcher.experiment import Experiment
from layercomb.launcher.finetuning import command
from layercomb.launcher.pretrained import (
    Pretrained,
    inside,
    pretrained,
    pretrained_tokenizer,
)
from layercomb.launcher.training import devices, running
from layercomb.layers.core.layer import Layer
from layercomb.model import Model

if TYPE_CHECKING:
    from layercomb.supervised.decoding.drafts import Speculation

__all__ = [
    'configured',
    'find_config',
    'main',
    'pretrained',
    'pretrained_tokenizer',
    'train',
    'trained',
]


def train(*args: Any, **fields: Any) -> Experiment:
    """Makes an `Experiment`. A configuration binds its arguments, the fields of `Experiment`."""
    return Experiment(*args, **fields)


# Gin reads names and defaults from it.
train.__dict__['__signature__'] = inspect.signature(Experiment).replace(
    return_annotation='Experiment'
)


@terminal.any_console()
def main(command_line: Sequence[str] | None = None) -> int:
    """Runs the launcher.

    Args:
      command_line: words, without the program's name; by default those of the process.

    Returns:
      The exit code: 0, 2 for a mistake that the user can put right, or 130 after Ctrl-C.
    """
    parsed = argparse.Namespace(run=None)
    began = time.monotonic()
    try:
        parsed = arguments.parser(_COMMANDS).parse_args(command_line)
        parsed.began = began
        cure = 'put that right, and run the same again'
        kept = compile_cache.kept(not parsed.no_compile_cache)
        with terminal.plain_warnings(), machine_errors(cure), kept:
            parsed.run(parsed)
            terminal.flush()
    except UsageError as e:
        print(f'layercomb: {one_line(e)}', file=sys.stderr)  # gin adds lines of its own
        return 2
    except BrokenPipeError:  # the reader of the output has closed it
        terminal.stop_writing()
    except KeyboardInterrupt:
        resumes = '; the same command goes on from the last checkpoint'
        print(
            f'layercomb: stopped{resumes if parsed.run in (run_train, run_finetune) else ""}',
            file=sys.stderr,
        )
        return 130
    return 0


def run_train(options: argparse.Namespace) -> None:
    """``layercomb train CONFIG``: trains, or goes on training, and shows what came out."""
    source = find_config(options.config)
    directory = runs.directory_of(options.output_dir, source)
    text = runs.read_text(source)
    with (
        devices.together(options),
        inside(directory),
        configured(text, options.gin_param, source.name, source) as config,
    ):
        experiment = config.build()
        asked = running.asked(options)
        runs.check_directory(directory, config.text, bool(asked.allowed))
        running.run(config, experiment, directory, asked)


def run_finetune(options: argparse.Namespace) -> None:
    """``layercomb finetune SOURCE [DATA]``: teaches a model that exists a text of your own."""
    with devices.together(options):
        command.finetune(options, configured)


def run_eval(options: argparse.Namespace) -> None:
    """``layercomb eval SOURCE``: measures a model by its tasks, or on a text of your own."""
    if options.text is not None:
        _eval_text(options)
        return
    for name in ('window', 'bits', 'calibrate', 'no_weight_cache'):
        if getattr(options, name) is not None:
            raise UsageError(f'--{name} is about a text: give --text FILE too, or leave it out')
    from layercomb.supervised import evaluate
    from layercomb.supervised.preference.reference import recalled

    if sources.find(options.source).kind != sources.RUN:
        raise UsageError(
            f'{options.source!r} is no run, and has nothing to be measured on: give --text FILE'
        )
    with of_run(options.source, options.gin_param) as config:
        experiment = config.build()
        with usage_errors():
            experiment.check()
        if not experiment.eval_tasks:
            raise UsageError('the configuration measures nothing: bind train.eval_tasks')
        with usage_errors():
            signature = experiment.batch_signature()[: experiment.net.n_in]
        chosen = options.checkpoint
        model, step = runs.saved_model(options.source, experiment.net, signature, chosen)
        print(f'step {step}')
        tasks = recalled(experiment.eval_tasks, options.source)
        measured = evaluate(model.layer, model.weights or {}, model.state, tasks)
        terminal.write_measured(measured)


def _eval_text(options: argparse.Namespace) -> None:
    """Measures a model on a text: its likelihood a token and a byte."""
    from layercomb.supervised.decoding.likelihood import likelihood

    text = runs.read_text(paths.local(options.text, '--text'))
    model, tokenizer = _as_asked(options, calibration.text_of(options))
    with usage_errors():
        measured = likelihood(model, text, tokenizer, window=options.window)
    terminal.write_measured(measured)


def run_generate(options: argparse.Namespace) -> None:
    """``layercomb generate SOURCE``: continues a prompt, or answers it, as it is made."""
    from layercomb.supervised import decoding
    from layercomb.supervised.decoding import prompts

    arguments.sampling(options)  # what cannot be is said before a model is read
    prompt = terminal.read_prompt(options.prompt, options.prompt_file, options.stdin)
    model, tokenizer = _as_asked(options, calibration.text_of(options))
    sampling = arguments.sampling(options, getattr(tokenizer, 'generation', None))
    drafts = _speculation(options)
    with usage_errors():
        given = prompts.given(model, prompt, tokenizer)
        given |= {'n_tokens': options.n_tokens, 'eos_id': tokenizer.eos_id}
        shown = [] if 'inputs' in given else given['prompts'][0]
        if options.beams is not None:
            found = decoding.beam_search(model, n_beams=options.beams, **given)
            terminal.write_text(shown, found.tokens[0, 0], tokenizer)
            return
        ends = frozenset(getattr(tokenizer, 'stop_ids', ()))
        made = decoding.stream(model, **given, **sampling, speculate=drafts)
        tokens = terminal.until(made, ends)
    terminal.write_stream(shown, tokens, tokenizer)


def run_chat(options: argparse.Namespace) -> None:
    """``layercomb chat SOURCE``: talks with a model whose makers gave it a template for it."""
    from layercomb.launcher import chat

    model, tokenizer = _as_asked(options, calibration.text_of(options))
    sampling = arguments.sampling(options, getattr(tokenizer, 'generation', None))
    drafts = _speculation(options)
    with usage_errors():
        chat.talk(model, tokenizer, options.system, options.n_tokens, sampling, speculate=drafts)


def _as_asked(options: argparse.Namespace, calibrate: str | None) -> tuple[Model, Any]:
    """The model that a command names, as narrow as it says, and its tokenizer."""
    model, tokenizer = trained(
        options.source,
        options.gin_param,
        options.bits,
        checkpoint=options.checkpoint,
        calibrate=calibrate,
        cache=_weight_cache(options),
    )
    return others.with_kv_cache(model, getattr(options, 'kv_cache', None)), tokenizer


def _weight_cache(options: argparse.Namespace) -> Path | None:
    """The folder for weights that later commands map, unless it is turned off."""
    return compile_cache.usable_weights_folder(os.environ, not options.no_weight_cache)


def _speculation(options: argparse.Namespace) -> Speculation | None:
    """How tokens are drafted, as the options say; a draft's model is as narrow as the model."""

    def load(name: str) -> Model:
        cache = _weight_cache(options)
        model = trained(name, bits=options.bits, text=False, cache=cache)[0]
        with contextlib.suppress(UsageError):  # a draft may keep what it keeps
            model = others.with_kv_cache(model, options.kv_cache)
        return model

    return arguments.speculation(options, load)


def run_inspect(options: argparse.Namespace) -> None:
    """``layercomb inspect SOURCE``: the model as a table, and what training it takes."""
    from layercomb.summary import summary

    source = sources.find(options.source, configurations=True)
    if source.kind not in (sources.RUN, sources.CONFIG):
        for name in ('mesh', 'offload'):
            if getattr(options, name) is not None:
                raise UsageError(
                    f'inspect tells what decoding {options.source!r} takes, and --{name} is about '
                    'training: leave it out'
                )
        others.check_no_run(source, options.gin_param)
        model, _ = others.loaded(source)
        model = others.with_kv_cache(model, options.kv_cache)
        if options.kv_cache is not None and model.layer.n_in > 1:
            raise UsageError(
                'inspect tells what decoding takes of language models alone, and this one reads '
                f'{model.layer.n_in} inputs: leave --kv_cache out'
            )
        with usage_errors():
            print(summary(model.layer, others.signature_of(model)))
        _print_decoding_bytes(model)
        return
    if options.kv_cache is not None:
        raise UsageError(
            f'inspect tells what training {options.source!r} takes, and --kv_cache is about '
            'decoding: leave it out'
        )
    is_run, file = source.kind == sources.RUN, source.path
    with (
        of_run(options.source, options.gin_param)
        if is_run
        else configured(runs.read_text(file), options.gin_param, file.name, file)
    ) as config:
        experiment = config.build()
        with usage_errors():
            signature = experiment.batch_signature()
            given = None if options.mesh is None else parallel.make_mesh(**options.mesh)
            mesh = given or experiment.mesh
            print(summary(experiment.net, signature[: experiment.net.n_in]))
            takes = {'': experiment.training_bytes(mesh)}
            offload = options.offload or experiment.offload
            if offload is not None and (options.offload or 'streams' not in offload):
                takes = {'without': takes[''], offload: experiment.training_bytes(mesh, offload)}
    where = '' if mesh is None else f', on each of {mesh.size} devices,'
    _print_bytes(f'a training step on a batch of {signature[0].shape}{where}', takes)


def _print_decoding_bytes(model: Model) -> None:
    """What decoding a row takes, for a language model."""
    from layercomb.supervised import decoding

    if model.layer.n_in > 1:
        return
    try:
        length = min(1024, decoding.max_len(model.layer) or 1024)
        takes = decoding.decoding_bytes(model, length)
    except UsageError:  # it makes no text
        return
    _print_bytes(f'decoding a row of {length:,} positions', {'': takes})


def _print_bytes(what: str, takes: Mapping[str, Mapping[str, int]]) -> None:
    """Prints a column for each way, with its name above, and a row for each part."""
    print()
    print(f'{what} takes, in bytes:')
    if len(takes) > 1:
        print(' ' * 14 + ''.join(f'{name:>16}' for name in takes))
    for part in dict.fromkeys(part for its in takes.values() for part in its):
        print(f'  {part:<12}' + ''.join(f'{its.get(part, 0):>16,}' for its in takes.values()))


def run_serve(options: argparse.Namespace) -> None:
    """``layercomb serve SOURCE``: answers completions over HTTP, and shows a page to try them."""
    from layercomb import serving
    from layercomb.serving import hosts

    with usage_errors():
        limits = serving.Limits(
            max_tokens=options.max_tokens,
            max_prompt=options.max_prompt,
            max_concurrent=options.max_concurrent,
            max_queue=options.max_queue,
        )
        names = hosts.allowed(options.allowed_hosts) if options.allowed_hosts else ()
    key = arguments.api_key(options, os.environ)
    name = sources.find(options.source).title
    named = arguments.adapters(options, name)
    calibrate = calibration.text_of(options)
    with serving.bound(options.host, options.port) as socket:  # a taken port is known at once
        model, tokenizer = _as_asked(options, calibrate)
        model = adapters.with_adapters(
            model, named, lambda run: trained(run, text=False, merge=False)[0]
        )
        drafts = _speculation(options)
        serving.run(model, tokenizer, name, limits, socket, names, key, drafts)


def run_export(options: argparse.Namespace) -> None:
    """``layercomb export SOURCE OUT``: weights as safetensors, and decoding as a program."""
    from layercomb import export

    paths.local(options.out, 'out')  # what cannot be is said before a model is read
    source = sources.find(options.source)
    model, _ = trained(options.source, options.gin_param, text=False, checkpoint=options.checkpoint)
    is_run = source.kind == sources.RUN
    config = runs.config_of(source.path) if is_run else f'# The model {source.title!r}, loaded.\n'
    with usage_errors():
        written = export.write(
            model, options.out, config, batch_size=options.batch_size, max_len=options.max_len
        )
    for name, size in written.items():
        print(f'{name:<20}{size:>16,}')


def run_convert(options: argparse.Namespace) -> None:
    """``layercomb convert SOURCE OUT``: a model for other programs: Hugging Face's, or GGUF."""
    from layercomb import interop
    from layercomb.interop import peft

    arguments.check_convert(options)
    model, tokenizer = trained(
        options.source,
        options.gin_param,
        text=False,
        checkpoint=options.checkpoint,
        merge=not options.adapter,
    )
    with usage_errors():
        if options.adapter:
            written = peft.save(options.out, model, options.base)
        else:
            written = interop.save(options.out, model, tokenizer, dtype=options.dtype)
    for name, size in written.items():
        print(f'{name:<24}{size:>16,}')


def trained(
    name: str,
    bindings: Sequence[str] = (),
    bits: int | None = None,
    text: bool = True,
    checkpoint: str = 'last',
    merge: bool | None = None,
    calibrate: str | None = None,
    cache: Path | None = None,
) -> tuple[Model, Any]:
    """A trained model of text and its tokenizer.

    Args:
      name: the output directory of a run, or another model that `sources.find` finds.
      bindings: bindings that override the run's own configuration.
      bits: 16, 8 or 4 narrows the weights, see `transforms.quantize`; None leaves them.
      text: whether there must be a tokenizer.
      checkpoint: 'last', 'best' or the number of a step.
      merge: whether adapters of a run become a part of its weights, as of `Pretrained.finished`.
      calibrate: a text to round narrow weights for.
      cache: a folder for weights of models that are no runs, which later calls map; None for none.

    Returns:
      (model, tokenizer); the tokenizer is None if there is none.

    Raises:
      UsageError: if there is no such model or checkpoint, or no tokenizer although `text`; if
        bindings or a checkpoint are given for what is no run.
    """
    source = sources.find(name)
    if source.kind != sources.RUN:
        others.check_no_run(source, bindings, checkpoint)
        model, tokenizer = others.loaded(source, bits, calibrate, cache)
        if text and tokenizer is None:
            raise UsageError(f'{name!r} has no tokenizer, so it makes no text: put one beside it')
        return model, tokenizer
    with of_run(name, bindings) as config:
        made, tokenizer = config.value('model'), config.value('tokenizer')
        net = made.layer if isinstance(made, Model) else made
        if not isinstance(net, Layer):
            raise UsageError(f'{name!r} has no model: bind train.model')
        tokenizer = getattr(made, 'tokenizer', None) if tokenizer is None else tokenizer
        if text and tokenizer is None:
            raise UsageError('this run has no tokenizer, so it makes no text: bind train.tokenizer')
        tokenizer = others.checked_tokenizer(tokenizer, text)
        known = isinstance(made, Pretrained)
        signature = made.signature if known else others.signature_of_text(net)
        model, _ = runs.saved_model(name, net, signature, checkpoint)
    with usage_errors():
        if known:
            merge = True if bits is not None else merge
            model = made.finished(model.weights or {}, model.state, merge=merge)
        return others.narrowed(model, bits, calibrate, tokenizer), tokenizer


@contextlib.contextmanager
def of_run(name: str, bindings: Sequence[str] = ()) -> Iterator[Config]:
    """The configuration of a run, which takes what the run keeps of a model that it began from.

    Args:
      name: the run's directory.
      bindings: as of `configured`.
    """
    file = runs.config_file(name)
    with inside(name), configured(runs.read_text(file), bindings, name, file) as config:
        yield config


def configured(
    text: str, bindings: Sequence[str], name: str, file: Path | None = None
) -> contextlib.AbstractContextManager[Config]:
    """Parses a configuration and then further bindings; see `configurations.configured`.

    Args:
      text, bindings, name, file: as there.
    """
    return configurations.configured(require('gin', 'train'), train, text, bindings, name, file)


_COMMANDS = {
    'train': run_train,
    'finetune': run_finetune,
    'eval': run_eval,
    'inspect': run_inspect,
    'generate': run_generate,
    'chat': run_chat,
    'serve': run_serve,
    'export': run_export,
    'convert': run_convert,
}
