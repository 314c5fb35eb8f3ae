"""Paths as people give them: the home directory, relative ones, URLs, places that cannot be."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import checkpoints, cli, data, export, models, paths, supervised, tl
from layercomb.errors import UsageError
from layercomb.interop.safetensors import load_weights, save_weights
from layercomb.launcher import runs
from layercomb.supervised import reports
from layercomb.supervised.checkpoints import Checkpoints, saved_weights

NET = tl.Dense(2)
BATCH = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)


def loop(directory, net=NET, batches=(BATCH,) * 6, **options):
    task = supervised.TrainTask(list(batches), tl.CrossEntropyLoss(), optax.sgd(0.1))
    return supervised.Loop(net, task, output_dir=directory, progress=False, **options)


def model():
    return lc.Model(NET).init(BATCH[0])


def language_model():
    net = models.TransformerLM(16, 8, 8, 1, 2, max_len=8)
    return lc.Model(net).init(lc.shape_dtype((1, 4), 'int32'))


def below(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob('*'))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the home directory is another."""
    for name in ('here', 'home', 'elsewhere'):
        (tmp_path / name).mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here'


# Every entrance from Python that takes a path, as a function of it, and what its messages call it.
WRITES = {
    'Loop': lambda path: loop(path).run(1),
    'Checkpoints': Checkpoints,
    'MetricsLog': lambda path: reports.MetricsLog(path).close(),
    'Model.save': lambda path: model().save(path),
    'save_tree': lambda path: checkpoints.save_tree(path, {'x': np.ones(3)}),
    'export.write': lambda path: export.write(language_model(), path, ''),
    'save_weights': lambda path: save_weights(path, {'x': np.ones(3)}),
}
READS = {
    'saved_weights': lambda path: saved_weights(path, {}),
    'saved_model': lambda path: runs.saved_model(path, NET, (lc.shape_dtype((4, 3)),)),
    'config_of': runs.config_of,
    'Model.load': lambda path: model().load(path),
    'load_tree': lambda path: checkpoints.load_tree(path, {}),
    'load_weights': load_weights,
    'read_metrics': reports.read_metrics,
    'write_report': reports.write_report,
    'text_files': data.text_files,
    'png_images': data.png_images,
    'enwik8': data.enwik8,
    'cifar10': data.cifar10,
    'imagenet64': data.imagenet64,
    'c4': data.c4,
    'scientific_papers': data.scientific_papers,
    'tfds': lambda path: data.tfds('c4/en', data_dir=path),
    'c4 of tfds': lambda path: data.c4(data_dir=path),
}
ENTRANCES = {**WRITES, **READS}

NO_PATHS = {
    'gs://bucket/run': 'is a URL, and only files of this machine',
    's3://bucket/run/*.txt': 'is a URL',
    'file:///tmp/run': 'is a URL.*: give the path alone',
    'hf://datasets/x': 'is a URL',
    Path('gs://bucket/run'): "'gs:/bucket/run' is a URL",
    b'https://host/x': 'is a URL',
    '': "is empty: give a path, '.' for the current directory",
    b'': 'is empty',
    'a\0b': 'holds a NUL',
    '~nobody-of-this-name/run': "no home directory of '~nobody-of-this-name'",
}


@pytest.mark.parametrize('path', NO_PATHS, ids=repr)
@pytest.mark.parametrize('entrance', ENTRANCES)
def test_what_is_no_local_path_is_refused_and_nothing_is_made(here, entrance, path):
    with pytest.raises(UsageError, match=NO_PATHS[path]) as error:
        ENTRANCES[entrance](path)
    assert '\n' not in str(error.value)
    assert below(here.parent) == ['elsewhere', 'here', 'home']


@pytest.mark.parametrize('entrance', ENTRANCES)
def test_what_is_no_path_at_all_is_a_type_error(here, entrance):
    with pytest.raises(TypeError):
        ENTRANCES[entrance](3)
    assert below(here) == []


COMMANDS = {
    'train': lambda path: ['train', 'reformer_python', '--output_dir', path],
    'train a configuration': lambda path: ['train', path],
    'eval': lambda path: ['eval', path],
    'inspect': lambda path: ['inspect', path],
    'generate': lambda path: ['generate', path, '--prompt', 'a'],
    'generate from a file': lambda path: ['generate', 'run', '--prompt_file', path],
    'serve': lambda path: ['serve', path, '--port', '0'],
    'export': lambda path: ['export', path, 'out'],
}


@pytest.mark.parametrize('path', ['gs://bucket/run', '', '~nobody-of-this-name/run', 'file:///x'])
@pytest.mark.parametrize('command', COMMANDS)
def test_the_launcher_refuses_what_is_no_local_path(here, capsys, command, path):
    assert cli.main(COMMANDS[command](path)) == 2
    said = capsys.readouterr().err
    assert said.startswith('layercomb: ') and said.count('\n') == 1
    assert any(x in said for x in ('is a URL', 'is empty', 'no home directory'))
    assert below(here) == []


def test_export_from_the_launcher_refuses_a_url(here, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'trained', lambda *_, **__: (language_model(), None))
    monkeypatch.setattr(runs, 'config_of', lambda _: '')
    assert cli.main(['export', 'run', 's3://bucket/out']) == 2
    assert "out='s3://bucket/out' is a URL" in capsys.readouterr().err
    assert below(here) == []


def test_a_tilde_is_the_home_directory_for_all_that_is_written(here):
    home = here.parent / 'home'
    loop('~/run').run(1)
    model().save('~/model')
    checkpoints.save_tree('~/tree', {'x': np.ones(3)})
    save_weights('~/x.safetensors', {'x': np.arange(3.0, dtype=np.float32)})
    assert below(here) == []
    names = ['model', 'run', 'tree', 'x.safetensors']
    assert sorted(path.name for path in home.glob('[!.]*')) == names
    assert loop(home / 'run').step == loop('~/run').step == 1
    _, _, step = saved_weights('~/run', model().weights)
    assert step == 1 and reports.read_metrics('~/run')[-1]['step'] == 1
    assert reports.write_report('~/run') == home / 'run' / 'report.png'
    np.testing.assert_array_equal(load_weights('~/x.safetensors')['x'], [0, 1, 2])
    assert model().load('~/model').weights is not None


def test_a_tilde_and_a_name_is_that_users_home(here, monkeypatch):
    pwd = pytest.importorskip('pwd')
    user = pwd.getpwuid(os.getuid())
    assert paths.local(f'~{user.pw_name}/run', 'output_dir') == Path(user.pw_dir) / 'run'


def test_a_tilde_without_a_home_is_refused(here, monkeypatch):
    monkeypatch.setenv('HOME', '')
    with pytest.raises(UsageError, match="no home directory of '~'"):
        loop('~/run')
    assert below(here) == []


def test_a_name_that_begins_with_a_tilde_is_reached_by_a_dot(here):
    (here / '~notes.txt').write_text('dear')
    assert list(data.text_files('./~notes.txt')) == [b'dear']
    assert paths.local('./~notes.txt', 'pattern') == here / '~notes.txt'


def test_parents_of_links_are_not_taken_for_text(here):
    (here.parent / 'elsewhere' / 'deep').mkdir()
    (here / 'link').symlink_to(here.parent / 'elsewhere' / 'deep')
    (here.parent / 'elsewhere' / 'a.txt').write_text('there')
    (here / 'a.txt').write_text('here')
    assert list(data.text_files('link/../a.txt')) == [b'there']


def test_a_run_goes_on_where_it_began_after_a_change_of_directory(here, monkeypatch):
    trained = loop('runs/x', checkpoint_every=1)
    trained.run(1)
    monkeypatch.chdir(here.parent / 'elsewhere')
    trained.run(3)
    assert below(here.parent / 'elsewhere') == []
    run = here / 'runs' / 'x'
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['1', '2', '3']
    assert [row['step'] for row in reports.read_metrics(run)] == [1, 3]
    assert (run / 'report.png').exists()


def test_a_loop_made_before_a_change_of_directory_begins_where_it_was_made(here, monkeypatch):
    made = loop('run')
    log = reports.MetricsLog('log')
    monkeypatch.chdir(here.parent / 'elsewhere')
    made.run(1)
    log.write({'step': 1, 'train/loss': 2.0})
    log.close()
    assert below(here.parent / 'elsewhere') == []
    assert (here / 'run' / 'report.png').exists()
    assert reports.read_metrics(here / 'log') == [{'step': 1, 'train/loss': 2.0}]


def test_sources_read_what_they_meant_after_a_change_of_directory(here, monkeypatch):
    (here / 'a.txt').write_text('mine')
    (here / 'enwik8').write_bytes(b'0123456789' * 2)
    line = json.dumps({'text': 'a line'}).encode() + b'\n'
    (here / 'plain.json').write_bytes(line)
    (here / 'packed.json.gz').write_bytes(gzip.compress(line))
    (here / 'cifar').mkdir()
    for name in [f'data_batch_{i}.bin' for i in range(1, 6)]:
        (here / 'cifar' / name).write_bytes(bytes(3073))
    elsewhere = here.parent / 'elsewhere'
    (elsewhere / 'a.txt').write_text('of others')
    texts, wikipedia = data.text_files('*.txt'), data.enwik8('enwik8')
    crawled = [data.c4('plain.json'), data.c4(b'packed.json.gz')]
    images = data.cifar10(Path('cifar'))
    monkeypatch.chdir(elsewhere)
    assert list(texts) == [b'mine'] and list(wikipedia) == [b'012345678901234567']
    assert [list(documents) for documents in crawled] == [[b'a line'], [b'a line']]
    assert len(images) == 5


def test_the_split_of_a_file_does_not_depend_on_how_its_folder_is_named(here):
    for i in range(60):
        (here / f'{i}.txt').write_text(str(i))
    for split in ('train', 'valid', 'test'):
        by_name = list(data.text_files(here, split))
        assert list(data.text_files('.', split)) == by_name
        assert list(data.text_files(b'*.txt', split)) == by_name
        assert list(data.text_files('../here/*.txt', split)) == by_name


NAMES = [
    'läuf 100% #1?&x',
    Path('模型'),
    b"it's {x} $a$b_$c",
    'new\nline',
    Path(' spaces '),
    b'a b:',
]


@pytest.mark.parametrize('name', NAMES)
def test_any_name_is_a_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / os.fsdecode(name)
    loop(name).run(1)
    assert loop(run).step == 1
    assert {'checkpoints', 'metrics.jsonl', 'report.png'} <= {path.name for path in run.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == [os.fsdecode(name)]
    model().save(run / 'model')
    assert model().load(run / 'model').weights is not None


def test_a_name_that_is_no_utf8_is_refused_where_the_arrays_go(tmp_path):
    strange = os.path.join(os.fsencode(tmp_path), b'x\xff')
    for write in (loop, lambda path: model().save(path)):
        with pytest.raises(UsageError, match=r'is no UTF-8, and checkpoints need one that is'):
            write(strange)
    assert below(tmp_path) == []


def test_a_directory_named_like_a_scheme_is_refused_where_the_arrays_go(tmp_path):
    for write in (loop, lambda path: model().save(path)):
        with pytest.raises(
            UsageError, match="'gs:', which checkpoints would take for the beginning"
        ):
            write(tmp_path / 'gs:' / 'run')
    assert below(tmp_path) == []


def test_text_in_a_file_whose_name_is_no_utf8_is_read(tmp_path):
    strange = os.path.join(os.fsencode(tmp_path), b'x\xff.txt')
    with open(strange, 'wb') as file:
        file.write(b'dear')
    assert list(data.text_files(strange)) == list(data.text_files(tmp_path)) == [b'dear']


@pytest.mark.parametrize('entrance', WRITES)
@pytest.mark.parametrize('where', ['file/deep/run', 'file/run'])
def test_no_directory_is_made_below_a_file(tmp_path, entrance, where):
    (tmp_path / 'file').write_text('dear')
    with pytest.raises(UsageError, match='Not a directory'):
        WRITES[entrance](tmp_path / where)
    assert below(tmp_path) == ['file']


@pytest.mark.parametrize('entrance', [name for name in WRITES if name != 'save_weights'])
def test_a_file_where_a_directory_is_wanted(tmp_path, entrance):
    (tmp_path / 'file').write_text('dear')
    with pytest.raises(UsageError, match=r'Not a directory|File exists|is not empty'):
        WRITES[entrance](tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'dear' and below(tmp_path) == ['file']


def test_a_link_to_nothing_is_no_directory(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    with pytest.raises(UsageError, match='Not a directory'):
        loop(tmp_path / 'link')
    assert below(tmp_path) == ['link']


def test_a_directory_where_a_file_is_wanted(tmp_path):
    for write in (lambda: save_weights(tmp_path, {'x': np.ones(3)}), lambda: load_weights(tmp_path),
                  lambda: data.enwik8(tmp_path)):  # fmt: skip
        with pytest.raises(UsageError, match=r'[Ii]s a directory|os error'):
            write()
    assert below(tmp_path) == []


@pytest.mark.parametrize('entrance', WRITES)
def test_a_place_that_nobody_may_write_to(tmp_path, monkeypatch, entrance):
    (tmp_path / 'locked').mkdir()
    if entrance == 'save_weights':
        place = tmp_path / 'nowhere' / 'x.safetensors'  # nobody makes its directory
    else:  # the superuser may write anywhere
        monkeypatch.setattr(os, 'access', lambda path, how: False)
        place = tmp_path / 'locked' / 'run'
    if entrance == 'MetricsLog':
        monkeypatch.setattr(Path, 'mkdir', _refuse(errno.EROFS))
    with pytest.raises(UsageError, match=r'Permission denied|No such file|Read-only file system'):
        WRITES[entrance](place)
    assert below(tmp_path) == ['locked']


def _refuse(code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_wrong_model_or_wrong_data_leave_no_directory(tmp_path):
    with pytest.raises(ValueError):
        loop(tmp_path / 'runs' / 'x', net=tl.Serial(tl.Dense(2), tl.LearnedPositions(2)))
    with pytest.raises(TypeError, match='check the data'):
        loop(tmp_path / 'runs' / 'x', batches=[BATCH[:2]])
    with pytest.raises(UsageError):
        loop(tmp_path / 'runs' / 'x', batches=[])
    loop(tmp_path / 'runs' / 'x')  # nothing was learnt yet
    assert below(tmp_path) == []


def test_what_a_full_disk_leaves_of_a_saved_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, '_file_checksums', _refuse(errno.ENOSPC))
    with pytest.raises(UsageError, match='No space left on device: free some space'):
        model().save(tmp_path / 'new' / 'model')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UsageError, match='No space left on device: free some space'):
        model().save(tmp_path / 'empty')
    assert below(tmp_path) == ['empty']
    monkeypatch.undo()
    model().save(tmp_path / 'empty')
    assert model().load(tmp_path / 'empty').weights is not None


def test_what_a_full_disk_leaves_of_an_export(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'save_weights', _refuse(errno.ENOSPC))
    with pytest.raises(UsageError, match='No space left on device: free some space'):
        export.write(language_model(), tmp_path / 'new' / 'deep' / 'out', '')
    assert below(tmp_path) == []


def test_safetensors_says_what_the_system_refused(tmp_path, monkeypatch):
    library = pytest.importorskip('safetensors')

    def full(*_, **__):
        raise library.SafetensorError('I/O error: No space left on device (os error 28)')

    monkeypatch.setattr('safetensors.numpy.save_file', full)
    with pytest.raises(UsageError, match=r'No space left on device \(.*x\): free some space'):
        save_weights(tmp_path / 'x', {'x': np.ones(3)})


@pytest.mark.parametrize('entrance', ENTRANCES)
def test_a_working_directory_that_was_deleted(here, monkeypatch, entrance):
    monkeypatch.setattr(os, 'getcwd', _refuse(errno.ENOENT))
    with pytest.raises(UsageError, match='relative to a working directory that is no longer there'):
        ENTRANCES[entrance]('x')


def test_a_tilde_in_a_binding_of_the_launcher(here, capsys):
    texts = here.parent / 'home' / 'texts'
    texts.mkdir()
    (texts / 'a.txt').write_text('the cat sat on the mat. ' * 9)
    config = here / 'mine.gin'
    config.write_text(
        'from __gin__ import dynamic_registration\n'
        'from layercomb import cli\nfrom layercomb import data\nfrom layercomb import layers\n'
        'from layercomb import models\nfrom layercomb import optimizers\n'
        'from layercomb import supervised\n'
        'cli.train.model = @models.TransformerLM()\n'
        'cli.train.train_task = @supervised.TrainTask()\n'
        'models.TransformerLM.vocab_size = 256\nmodels.TransformerLM.d_model = 8\n'
        'models.TransformerLM.d_ff = 8\nmodels.TransformerLM.n_layers = 1\n'
        'models.TransformerLM.n_heads = 2\nmodels.TransformerLM.max_len = 8\n'
        'supervised.TrainTask.data = @data.packed()\n'
        'supervised.TrainTask.loss = @layers.CrossEntropyLoss()\n'
        'supervised.TrainTask.optimizer = @optimizers.adamw()\n'
        'data.packed.source = @data.text_files()\ndata.packed.length = 8\n'
        "data.packed.batch_size = 2\ndata.text_files.pattern = '~/texts/*.txt'\n"
    )
    for binding, said in {
        "text_files.pattern='gs://bucket/*'": "pattern='gs://bucket/*' is a URL",
        "text_files.pattern=''": 'pattern is empty',
    }.items():
        words = ['train', str(config), '--output_dir', '~/run', '--gin_param', binding]
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err
    assert below(here) == ['mine.gin'] and [p.name for p in texts.parent.iterdir()] == ['texts']
    assert (
        cli.main(['train', str(config), '--output_dir=~/run', '--gin_param', 'train.steps=1']) == 0
    )
    assert (texts.parent / 'run' / 'config.gin').is_file() and below(here) == ['mine.gin']


def test_kernels_are_not_kept_in_a_relative_cache(here, monkeypatch):
    from layercomb_kernels import build

    monkeypatch.setenv('XDG_CACHE_HOME', 'cache')  # which the XDG specification says to ignore
    assert build._cache() == here.parent / 'home' / '.cache'
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # nobody knows the home
    with pytest.raises(build.Unavailable, match=r'no home directory .*: set XDG_CACHE_HOME'):
        build._cache()


def test_kernels_without_a_writable_cache_say_so_in_a_line(here, monkeypatch):
    from layercomb_kernels import build

    (here / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(here / 'file'))
    with pytest.raises(build.Unavailable) as error:
        build.load()
    assert '\n' not in str(error.value)
