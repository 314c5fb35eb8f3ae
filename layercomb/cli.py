"""The launcher: ``layercomb train | eval | inspect | generate | chat | serve | export | convert``.

This is the only file that imports gin. It hands trained models and tokenizers to the others.

A configuration says ``from layercomb import cli`` and binds the arguments of `train`. A mistake of
the user ends with exit code 2 and one line of cause and cure; a traceback is a bug.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layercomb import paths, transforms
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError, machine_errors, one_line, require, usage_errors
from layercomb.launcher import (
    adapters,
    arguments,
    compile_cache,
    includes,
    runs,
    sources,
    stopping,
    terminal,
)
from layercomb.launcher.experiment import Experiment
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.shapes import Signature, shape_dtype


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
    try:
        parsed = arguments.parser(_COMMANDS).parse_args(command_line)
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
        print(f'layercomb: stopped{resumes if parsed.run is run_train else ""}', file=sys.stderr)
        return 130
    return 0


def run_train(options: argparse.Namespace) -> None:
    """``layercomb train CONFIG``: trains, or goes on training, and shows what came out."""
    from layercomb.supervised.fingerprint import check_allowed

    source = find_config(options.config)
    named = options.output_dir
    directory = paths.local(Path('runs') / source.stem if named is None else named, '--output_dir')
    text = runs.read_text(source)
    with configured(text, options.gin_param, source.name, source) as config:
        experiment = config.build()
        with usage_errors():
            allowed = check_allowed(options.allow_changes)
        runs.check_directory(directory, config.text, bool(allowed))
        with usage_errors():
            experiment.check_sample()
            loop = experiment.loop(directory, allowed)  # checks the rest before anything is written
            with machine_errors('choose another --output_dir'):
                directory.mkdir(parents=True, exist_ok=True)
                config.write(directory)
        with stopping.on_sigterm(loop.stop) as asked:
            row = loop.run(experiment.steps)
        if asked and loop.step < experiment.steps:
            saved = f'after step {loop.step}, which is saved' if loop.step else 'before any step'
            print(f'layercomb: stopped {saved}; the same command goes on', file=sys.stderr)
            return
        cure = 'it is trained and saved; put that right, and run the same again'
        with usage_errors(), machine_errors(cure):
            terminal.write_result(experiment, loop, row, directory)


def run_eval(options: argparse.Namespace) -> None:
    """``layercomb eval SOURCE``: measures a model by its tasks, or on a text of your own."""
    if options.text is not None:
        _eval_text(options)
        return
    for name in ('window', 'bits'):
        if getattr(options, name) is not None:
            raise UsageError(f'--{name} is about a text: give --text FILE too, or leave it out')
    from layercomb.supervised import evaluate

    if sources.find(options.source).kind != sources.RUN:
        raise UsageError(
            f'{options.source!r} is no run, and has nothing to be measured on: give --text FILE'
        )
    file = runs.config_file(options.source)
    with configured(runs.read_text(file), options.gin_param, options.source, file) as config:
        experiment = config.build()
        with usage_errors():
            experiment.check()
        if not experiment.eval_tasks:
            raise UsageError('the configuration measures nothing: bind train.eval_tasks')
        with usage_errors():
            signature = experiment.batch_signature()[: experiment.model.n_in]
        chosen = options.checkpoint
        model, step = runs.saved_model(options.source, experiment.model, signature, chosen)
        print(f'step {step}')
        measured = evaluate(model.layer, model.weights or {}, model.state, experiment.eval_tasks)
        terminal.write_measured(measured)


def _eval_text(options: argparse.Namespace) -> None:
    """Measures a model on a text: its likelihood a token and a byte."""
    from layercomb.supervised.decoding.likelihood import likelihood

    text = runs.read_text(paths.local(options.text, '--text'))
    model, tokenizer = trained(
        options.source, options.gin_param, options.bits, checkpoint=options.checkpoint
    )
    with usage_errors():
        measured = likelihood(model, text, tokenizer, window=options.window)
    terminal.write_measured(measured)


def run_generate(options: argparse.Namespace) -> None:
    """``layercomb generate SOURCE``: continues a prompt, or answers it, as it is made."""
    from layercomb.supervised import decoding
    from layercomb.supervised.decoding import prompts

    arguments.sampling(options)  # what cannot be is said before a model is read
    prompt = terminal.read_prompt(options.prompt, options.prompt_file, options.stdin)
    model, tokenizer = trained(
        options.source, options.gin_param, options.bits, checkpoint=options.checkpoint
    )
    sampling = arguments.sampling(options, getattr(tokenizer, 'generation', None))
    with usage_errors():
        given = prompts.given(model, prompt, tokenizer)
        given |= {'n_tokens': options.n_tokens, 'eos_id': tokenizer.eos_id}
        shown = [] if 'inputs' in given else given['prompts'][0]
        if options.beams is not None:
            found = decoding.beam_search(model, n_beams=options.beams, **given)
            terminal.write_text(shown, found.tokens[0, 0], tokenizer)
            return
        ends = frozenset(getattr(tokenizer, 'stop_ids', ()))
        tokens = terminal.until(decoding.stream(model, **given, **sampling), ends)
    terminal.write_stream(shown, tokens, tokenizer)


def run_chat(options: argparse.Namespace) -> None:
    """``layercomb chat SOURCE``: talks with a model whose makers gave it a template for it."""
    from layercomb.launcher import chat

    model, tokenizer = trained(
        options.source, options.gin_param, options.bits, checkpoint=options.checkpoint
    )
    sampling = arguments.sampling(options, getattr(tokenizer, 'generation', None))
    with usage_errors():
        chat.talk(model, tokenizer, options.system, options.n_tokens, sampling)


def run_inspect(options: argparse.Namespace) -> None:
    """``layercomb inspect SOURCE``: the model as a table, and what training it takes."""
    from layercomb.summary import summary

    source = sources.find(options.source, configurations=True)
    if source.kind not in (sources.RUN, sources.CONFIG):
        _check_no_run(source, options.gin_param)
        model, _ = loaded(source)
        with usage_errors():
            print(summary(model.layer, _signature_of(model)))
        return
    file = runs.config_file(source.path) if source.kind == sources.RUN else source.path
    name = options.source if source.kind == sources.RUN else file.name
    with configured(runs.read_text(file), options.gin_param, name, file) as config:
        experiment = config.build()
        with usage_errors():
            signature = experiment.batch_signature()
            print(summary(experiment.model, signature[: experiment.model.n_in]))
            takes = experiment.training_bytes()
    print()
    print(f'a training step on a batch of {signature[0].shape} takes, in bytes:')
    for what, n in takes.items():
        print(f'  {what:<12}{n:>16,}')


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
    with serving.bound(options.host, options.port) as socket:  # a taken port is known at once
        model, tokenizer = trained(
            options.source, options.gin_param, options.bits, checkpoint=options.checkpoint
        )
        model = adapters.with_adapters(model, named, lambda run: trained(run, text=False)[0])
        serving.run(model, tokenizer, name, limits, socket, names, key)


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
        options.source, options.gin_param, text=False, checkpoint=options.checkpoint
    )
    with usage_errors():
        if options.adapter:
            written = peft.save(options.out, model, options.base)
        else:
            written = interop.save(options.out, model, tokenizer, dtype=options.dtype)
    for name, size in written.items():
        print(f'{name:<24}{size:>16,}')


def loaded(source: sources.Source, bits: int | None = None) -> tuple[Model, Any]:
    """A model of another library, and its tokenizer if it has one.

    Args:
      source: of a kind other than a run or a configuration.
      bits: 16, 8 or 4 narrows the weights; None leaves them as they come.
    """
    from layercomb import interop

    with usage_errors():
        if bits == 16 and source.kind == sources.HUGGING_FACE:  # without a wide copy
            return interop.load(source.path, dtype='bfloat16')
        # Narrow weights cannot be narrowed again, so they are read as wide ones; Trax's are wide.
        wide = bits is not None and source.kind != sources.TRAX
        model, tokenizer = interop.load(source.path, **({'dtype': 'float32'} if wide else {}))
        return _narrowed(model, bits), tokenizer


def trained(
    name: str,
    bindings: Sequence[str] = (),
    bits: int | None = None,
    text: bool = True,
    checkpoint: str = 'last',
) -> tuple[Model, Any]:
    """A trained model of text and its tokenizer.

    Args:
      name: the output directory of a run, or another model that `sources.find` finds.
      bindings: bindings that override the run's own configuration.
      bits: 16, 8 or 4 narrows the weights, see `transforms.quantize`; None leaves them.
      text: whether there must be a tokenizer.
      checkpoint: 'last', 'best' or the number of a step.

    Returns:
      (model, tokenizer); the tokenizer is None if there is none.

    Raises:
      UsageError: if there is no such model or checkpoint, or no tokenizer although `text`; if
        bindings or a checkpoint are given for what is no run.
    """
    source = sources.find(name)
    if source.kind != sources.RUN:
        _check_no_run(source, bindings, checkpoint)
        model, tokenizer = loaded(source, bits)
        if text and tokenizer is None:
            raise UsageError(f'{name!r} has no tokenizer, so it makes no text: put one beside it')
        return model, tokenizer
    file = runs.config_file(name)
    with configured(runs.read_text(file), bindings, name, file) as config:
        net, tokenizer = config.value('model'), config.value('tokenizer')
        if not isinstance(net, Layer):
            raise UsageError(f'{name!r} has no model: bind train.model')
        if text and tokenizer is None:
            raise UsageError('this run has no tokenizer, so it makes no text: bind train.tokenizer')
        if tokenizer is not None:
            with usage_errors():
                tokenizer = adapted(tokenizer, 'train', must_decode=text)
        model, _ = runs.saved_model(name, net, _signature_of_text(net), checkpoint)
    with usage_errors():
        return _narrowed(model, bits), tokenizer


def _check_no_run(
    source: sources.Source, bindings: Sequence[str], checkpoint: str = 'last'
) -> None:
    """Refuses options that are about runs, for a model that is none."""
    if bindings or checkpoint != 'last':
        option = '--gin_param' if bindings else '--checkpoint'
        raise UsageError(f'{source.name!r} is no run, so {option} means nothing: leave it out')


def _signature_of(model: Model) -> Signature:
    """The signature of a model of another library, also of one that is of no family."""
    from layercomb import interop

    try:
        return interop.signature(model)
    except UsageError:
        return _signature_of_text(model.layer)


def _narrowed(model: Model, bits: int | None) -> Model:
    if bits is None:
        return model
    return Model(*transforms.quantize(model.layer, model.weights or {}, bits=bits), model.state)


def _signature_of_text(net: Layer) -> Signature:
    """The signature of a short text: tokens, and for an encoder-decoder source and mask."""
    from layercomb.supervised.decoding import prompts

    length, of_source = (min(8, f(net) or 8) for f in (prompts.max_len, prompts.source_max_len))
    tokens, source = (shape_dtype((1, n), 'int32') for n in (length, of_source))
    mask = shape_dtype((1, of_source), bool)
    return (tokens,) if net.n_in == 1 else (source, tokens, mask)[: net.n_in]


class Config:
    """A parsed configuration, valid while its context is open.

    Attributes:
      text: the bindings, as gin writes them.
    """

    def __init__(self, gin: Any):
        self._gin = gin
        self.text: str = includes.written(gin, gin.config_str)

    def build(self) -> Any:
        """Builds the experiment.

        Raises:
          UsageError: if the configuration does not bind `train`, or a value in it is wrong.
        """
        with usage_errors():
            try:
                make = self._gin.get_configurable(train)
            except KeyError:
                raise UsageError(
                    'the configuration trains nothing: write "from layercomb import cli" and bind '
                    'cli.train.model and cli.train.train_task'
                ) from None
            return make()

    def write(self, directory: Path) -> None:
        """Writes the bindings, by which runs are compared, and the operative configuration.

        The latter also has the defaults of everything built so far.

        Args:
          directory: the run's directory, which must exist.
        """
        runs.write_text(directory / runs.CONFIG, self.text)
        operative = includes.written(self._gin, self._gin.operative_config_str)
        runs.write_text(directory / runs.OPERATIVE, operative)

    def value(self, name: str) -> Any:
        """Builds one argument of `train`, without the others.

        Args:
          name: of the argument.

        Returns:
          Its value; None if it is not bound.
        """
        with usage_errors():
            try:
                value = self._gin.query_parameter(f'cli.train.{name}')
            except ValueError:
                return None
            made = getattr(value, 'scoped_configurable_fn', None)
            return made() if made is not None else value


@contextlib.contextmanager
def configured(
    text: str, bindings: Sequence[str], name: str, file: Path | None = None
) -> Iterator[Config]:
    """Parses a configuration and then further bindings, such as ``train.steps=100``.

    Args:
      text: the configuration.
      bindings: bindings that override it; their includes are looked for in the working directory.
      name: what messages call it.
      file: its path; included files are looked for beside it.

    Raises:
      UsageError: if something in it is unknown, or does not parse.
    """
    gin = require('gin', 'train')
    parser = includes.Includes(gin)
    with includes.alone(gin):
        with _parsing(f'in {name}'):
            parser.parse(text, file or Path(name))
        for binding in bindings:
            with _parsing(f'in --gin_param {binding!r}'):
                terminal.check_text(binding, '--gin_param')
                imports = parser.imports
                try:
                    parser.parse(binding, Path('--gin_param'))
                except ValueError:  # a name that the file does not use needs the file's imports
                    if "doesn't have a parameter" in str(sys.exc_info()[1]):
                        raise
                    parser.parse(f'{imports}\n{binding}', Path('--gin_param'))
        gin.finalize()
        yield Config(gin)


@contextlib.contextmanager
def _parsing(where: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        where = includes.place(e) or where
        raise UsageError(f'{one_line(e)} ({where}){_nearest(e)}') from e


def find_config(name: str) -> Path:
    """The path of a configuration.

    Args:
      name: a path, or the name of a configuration that comes with the library.

    Raises:
      UsageError: if there is none, listing those of the library.
    """
    known = includes.library()
    stem = name.removesuffix('.gin')
    with machine_errors('check the path'):
        if stem in known and not Path(name).is_file():
            return known[stem]
        path = paths.local(name, 'config')
        if path.is_file():
            return path
    raise UsageError(
        f'no configuration {name!r}: give the path of a .gin file, or one of {", ".join(known)}'
    )


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


_COMMANDS = {
    'train': run_train,
    'eval': run_eval,
    'inspect': run_inspect,
    'generate': run_generate,
    'chat': run_chat,
    'serve': run_serve,
    'export': run_export,
    'convert': run_convert,
}
