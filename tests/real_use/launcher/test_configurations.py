"""Configurations that include others: found beside the one that says so, from any directory."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest

from layercomb import cli
from layercomb.errors import UsageError
from layercomb.launcher import includes, runs

BASE = """
from __gin__ import dynamic_registration
from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import models
from layercomb import optimizers
from layercomb import supervised

WIDTH = 8
cli.train.model = @models.TransformerLM()
cli.train.train_task = @supervised.TrainTask()
cli.train.eval_tasks = @supervised.EvalTask()
cli.train.tokenizer = @data.ByteTokenizer()
models.TransformerLM.vocab_size = 256
models.TransformerLM.d_model = %WIDTH
models.TransformerLM.d_ff = 8
models.TransformerLM.n_layers = 1
models.TransformerLM.n_heads = 2
models.TransformerLM.max_len = 16
supervised.TrainTask.data = @data.packed()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
supervised.EvalTask.data = @data.packed()
supervised.EvalTask.metrics = @tl.Accuracy()
supervised.EvalTask.n_batches = 1
data.packed.source = ('some text, and more', 'and more of it')
data.packed.length = 8
data.packed.batch_size = 2
"""


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A folder with base.gin, which is not the working directory."""
    (tmp_path / 'conf').mkdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'conf' / 'base.gin').write_text(BASE)
    monkeypatch.chdir(tmp_path / 'elsewhere')
    return tmp_path / 'conf'


def write(conf, text, name='mine.gin'):
    (conf / name).parent.mkdir(exist_ok=True)
    (conf / name).write_text(text, encoding='utf-8')
    return str(conf / name)


def built(name, *bindings):
    """The experiment that a configuration describes, and all that it binds."""
    file = cli.find_config(name)
    with cli.configured(runs.read_text(file), bindings, file.name, file) as config:
        return config.build(), config.text


def refused(capsys, *words):
    assert cli.main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith('layercomb: ') and said.count('\n') == 1, said
    return said


def test_a_neighbour_is_included_from_any_directory(conf, monkeypatch):
    mine = write(conf, "include 'base.gin'\ncli.train.steps = 7\n")
    assert built(mine)[0].steps == 7
    monkeypatch.chdir(conf)
    assert built('mine.gin')[0].steps == built('./mine.gin')[0].steps == 7


def test_the_neighbour_is_meant_and_not_one_of_its_name_in_the_working_directory(conf, tmp_path):
    write(tmp_path / 'elsewhere', BASE.replace('WIDTH = 8', 'WIDTH = 32'), 'base.gin')
    experiment, _ = built(write(conf, "include 'base.gin'\n"))
    assert experiment.model == built(str(conf / 'base.gin'))[0].model


def test_a_neighbour_goes_before_a_configuration_of_the_library(conf):
    write(conf, BASE, 'reformer_python.gin')
    assert built(write(conf, "include 'reformer_python.gin'\n"))[0].model.n_in == 1
    _, text = built(write(conf, "include 'reformer_python.gin'\n"))
    assert 'ReformerLM' not in text


def test_includes_go_from_the_file_that_includes(conf):
    write(conf, "include '../base.gin'\ncli.train.steps = 1\ncli.train.seed = 5\n", 'deep/a.gin')
    write(conf, "include 'a.gin'\ncli.train.steps = 2\n", 'deep/b.gin')
    experiment, _ = built(write(conf, "include 'deep/b.gin'\ncli.train.keep = 9\n"))
    assert (experiment.steps, experiment.seed, experiment.keep) == (2, 5, 9)


def test_a_file_may_be_included_by_two_others(conf):
    write(conf, "include 'base.gin'\ncli.train.seed = 1\n", 'a.gin')
    write(conf, "include 'base.gin'\ncli.train.keep = 2\n", 'b.gin')
    experiment, _ = built(write(conf, "include 'a.gin'\ninclude 'b.gin'\n"))
    assert (experiment.seed, experiment.keep) == (1, 2)


def test_includes_by_absolute_path_and_from_home(conf, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in (str(conf / 'base.gin'), '~/conf/base.gin'):
        assert built(write(tmp_path / 'elsewhere', f"include '{name}'\n"))[0].steps == 1000


def test_macros_of_the_included_file_are_used_and_changed(conf):
    eight, text = built(write(conf, "include 'base.gin'\nmodels.TransformerLM.d_ff = %WIDTH\n"))
    assert 'models.TransformerLM.d_ff = %WIDTH' in text
    sixteen, _ = built(write(conf, "include 'base.gin'\nWIDTH = 16\n"))
    assert eight.model != sixteen.model


def test_a_configuration_of_the_library_is_included_by_name(conf):
    for name in ('reformer_python.gin', 'reformer_python'):
        mine = write(conf, f"include '{name}'\ncli.train.steps = 7\n")
        experiment, _ = built(mine, 'ReformerLM.d_model=32', 'ReformerLM.d_ff=32')
        assert experiment.steps == 7
        assert experiment.model == built('reformer_python', 'ReformerLM.d_model=32',
                                         'ReformerLM.d_ff=32')[0].model  # fmt: skip


def test_bindings_of_the_launcher_use_the_imports_of_included_files(conf):
    mine = write(conf, "include 'base.gin'\n")
    experiment, _ = built(mine, 'supervised.TrainTask.clip_norm=2.0', 'train.steps=4')
    assert (experiment.train_task.clip_norm, experiment.steps) == (2.0, 4)
    with_schedule = 'optimizers.warmup_cosine.steps=9'  # which no file mentions
    assert 'warmup_cosine.steps = 9' in built(mine, with_schedule)[1]


def test_a_binding_may_include_from_the_working_directory(conf, tmp_path):
    write(tmp_path / 'elsewhere', 'cli.train.steps = 6\n', 'more.gin')
    assert built(str(conf / 'base.gin'), "include 'more.gin'")[0].steps == 6


def test_letters_that_are_not_ascii(conf):
    write(conf, BASE + "cli.train.sample_prompt = 'наука – ≥'\n", 'основа.gin')
    experiment, text = built(write(conf, "include 'основа.gin'\n", 'モデル.gin'))
    assert experiment.sample_prompt == 'наука – ≥' and 'наука – ≥' in text


def test_files_as_windows_writes_them(conf):
    (conf / 'base.gin').write_bytes(b'\xef\xbb\xbf' + BASE.replace('\n', '\r\n').encode())
    (conf / 'mine.gin').write_bytes(b"\xef\xbb\xbfinclude 'base.gin'\r\ncli.train.steps = 7\r\n")
    assert built(str(conf / 'mine.gin'))[0].steps == 7


MISTAKES = {
    "include 'nothing.gin'": r"mine.gin includes 'nothing.gin', and there is no file '.*nothing.gi",
    "include ''": 'include is empty',
    "include 'gs://bucket/base.gin'": 'is a URL',
    "include 'deep'": "there is no file '.*deep'",
    "include 'mine.gin'": 'mine.gin includes mine.gin: take one of these includes out',
    "include 'a.gin'": 'mine.gin includes a.gin includes b.gin includes mine.gin: take one',
    "include 'round.gin'": 'c.gin includes round.gin includes c.gin|round.gin includes c.gin incl',
    "include 'latin.gin'": "cannot read '.*latin.gin': byte 0xe4 at 13 is no UTF-8: save it as UT",
    "include 'typo.gin'": r"no parameter|parameter named 'stepz'.*in line 2 of .*typo.gin",
    "include 'broken.gin'": r'in line 1 of .*broken.gin',
    'include base.gin': r'\(in mine.gin\)$',
}


@pytest.mark.parametrize('text', MISTAKES)
def test_mistakes_of_including(conf, capsys, text):
    (conf / 'deep').mkdir()
    write(conf, "include 'b.gin'\n", 'a.gin')
    write(conf, "include 'mine.gin'\n", 'b.gin')
    write(conf, "include 'c.gin'\n", 'round.gin')
    write(conf, "include 'round.gin'\n", 'c.gin')
    (conf / 'latin.gin').write_bytes('# the first lä\n'.encode('latin-1'))
    write(conf, "include 'base.gin'\ncli.train.stepz = 3\n", 'typo.gin')
    write(conf, 'cli.train.steps = \n', 'broken.gin')
    said = refused(capsys, 'train', write(conf, f'{text}\n'), '--output_dir', 'run')
    assert re.search(MISTAKES[text], said), said
    assert not list((conf.parent / 'elsewhere').iterdir())


def test_a_loop_through_links_is_seen(conf, capsys):
    mine = write(conf, "include 'link.gin'\n")
    (conf / 'link.gin').symlink_to(mine)
    assert 'take one of these includes out' in refused(capsys, 'inspect', mine)


def test_a_run_outlives_what_it_included(conf, capsys, tmp_path, monkeypatch):
    mine = write(conf, "include 'base.gin'\ncli.train.steps = 1\n")
    assert cli.main(['train', mine, '--output_dir', str(tmp_path / 'run')]) == 0
    (conf / 'base.gin').write_text('this is no configuration')
    (tmp_path / 'third').mkdir()
    monkeypatch.chdir(tmp_path / 'third')
    capsys.readouterr()
    config = str(tmp_path / 'run' / 'config.gin')
    assert cli.main(['eval', '../run']) == 0
    assert cli.main(['generate', '../run', '--prompt', 'a', '--n_tokens', '2']) == 0
    again = ['train', config, '--output_dir', '../run', '--gin_param', 'train.steps=2']
    assert cli.main(again) == 0
    assert 'step 2: ' in capsys.readouterr().out
    assert 'include' not in (tmp_path / 'run' / 'config.gin').read_text()
    assert not list((tmp_path / 'third').iterdir())


def test_the_configuration_of_a_run_is_read_again_whatever_it_imports(conf, monkeypatch):
    """Gin writes imports in the order of ASCII, where capitals stand before `__gin__`."""
    write(conf, 'def steps():\n    return 6\n', 'MyModule.py')
    monkeypatch.syspath_prepend(str(conf))
    text = 'from __gin__ import dynamic_registration\nimport MyModule\nfrom layercomb import cli\n'
    mine = write(conf, f"{text}include 'base.gin'\ncli.train.steps = @MyModule.steps()\n")
    experiment, kept = built(mine)
    again, same = built(write(conf, kept, 'kept.gin'))
    assert experiment.steps == again.steps == 6 and kept == same


def test_constants_of_an_imported_module_are_there_each_time(conf, monkeypatch):
    write(conf, "import gin\ngin.constant('my_sizes.STEPS', 6)\n", 'my_sizes.py')
    monkeypatch.syspath_prepend(str(conf))
    write(conf, BASE + 'import my_sizes\ncli.train.steps = %my_sizes.STEPS\n', 'sized.gin')
    mine = write(conf, "include 'sized.gin'\n")
    steps = [built(mine)[0].steps for _ in range(2)]  # Python imports the module but once
    kept = write(conf, built(mine)[1], 'kept.gin')
    assert steps == [6, 6] and built(kept)[0].steps == 6
    assert 'my_sizes' in sys.modules


def test_a_name_that_two_files_import_differently_is_the_outer_one_for_bindings(conf):
    write(conf, BASE.replace('layers as tl', 'layers as t').replace('@tl.', '@t.'), 'base.gin')
    text = 'from __gin__ import dynamic_registration\nfrom layercomb import losses as t\n'
    parser = includes.Includes(None)
    parser._texts = [text, (conf / 'base.gin').read_text()]
    lines = parser.imports.splitlines()
    assert lines[0] == 'from __gin__ import dynamic_registration'
    assert lines[-1] == 'from layercomb import losses as t'
    experiment, kept = built(write(conf, f"{text}include 'base.gin'\n"))
    assert built(write(conf, kept, 'kept.gin'))[0].model == experiment.model


def test_a_full_disk_leaves_no_half_a_configuration(conf, capsys, monkeypatch):
    mine = write(conf, "include 'base.gin'\ncli.train.steps = 1\n")
    half = Path.write_text

    def full(path, text, encoding=None):
        half(path, text[:20], encoding=encoding)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_text', full)
        said = refused(capsys, 'train', mine, '--output_dir', 'run')
    assert 'No space left on device' in said and 'choose another --output_dir' in said
    assert not list((conf.parent / 'elsewhere' / 'run').iterdir())
    assert cli.main(['train', mine, '--output_dir', 'run']) == 0


def test_a_binding_means_the_same_whatever_was_read_before(conf):
    """Else it would find by parts of their names what other configurations have named."""
    for _ in range(2):
        with pytest.raises(UsageError, match='write the name in full'):
            built(str(conf / 'base.gin'), 'TransformerLM.attention=@tl.RMSNorm')
    built('reformer_python')
    with pytest.raises(UsageError, match='ReformerLM'):
        built(str(conf / 'base.gin'), 'ReformerLM.d_model=32')


def test_a_macro_goes_before_constants_of_other_configurations(conf, monkeypatch):
    write(conf, "import gin\ngin.constant('other_sizes.WIDTH', 6)\n", 'other_sizes.py')
    write(conf, 'import other_sizes\n', 'outer_sizes.py')
    monkeypatch.syspath_prepend(str(conf))
    plain = built(str(conf / 'base.gin'))[0].model
    outer = BASE.replace('WIDTH = 8', 'import outer_sizes').replace('n_heads = 2', 'n_heads = 1')
    outer = write(conf, outer.replace('%WIDTH', '%other_sizes.WIDTH'), 'outer.gin')
    inner = (conf / 'outer.gin').read_text().replace('import outer_', 'import other_')
    made = built(outer)[0].model
    assert made == built(outer)[0].model == built(write(conf, inner, 'inner.gin'))[0].model
    assert built(str(conf / 'base.gin'))[0].model == plain != made


def test_configurables_of_a_module_that_uses_gin_are_there_each_time(conf, monkeypatch):
    code = 'import gin\n@gin.configurable\ndef seven(n=7):\n    return n\n'
    write(conf, code, 'uses_gin.py')
    monkeypatch.syspath_prepend(str(conf))
    mine = write(conf, BASE + 'import uses_gin\ncli.train.steps = @uses_gin.seven()\n')
    assert [built(mine)[0].steps, built(mine, 'uses_gin.seven.n = 8')[0].steps] == [7, 8]


def test_gin_itself_is_left_as_it_was(conf):
    import gin

    def state():
        config = gin.config
        names = [sorted(dict(x.items())) for x in (config._REGISTRY, config._CONSTANTS)]
        return names, config.parse_config_file, config.ParseContext.process_import

    before = state()
    built(str(conf / 'base.gin'))
    with pytest.raises(UsageError):
        built(write(conf, "include 'nothing.gin'\n"))
    assert state() == before
