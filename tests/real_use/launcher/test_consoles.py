"""Consoles, prompts and files in which not every letter can be: none of them ends a command."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import layercomb as lc
from layercomb import cli, models
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.launcher import terminal
from layercomb.supervised import reports

PROMPT = 'наука – ≥ 模型'


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(256, 8, 8, 1, 2, max_len=128)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


@pytest.fixture(autouse=True)
def trained(model, monkeypatch):
    """In the place of a run's last checkpoint."""
    monkeypatch.setattr(cli, 'trained', lambda *_, **__: (model, ByteTokenizer()))


def console(encoding, errors='strict'):
    return io.TextIOWrapper(io.BytesIO(), encoding, errors)


def shown(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def generate(*words):
    return cli.main(['generate', 'run', '--n_tokens', '24', '--temperature', '2', *words])


@pytest.mark.parametrize('option', [(), ('--beams', '2')], ids=['drawn', 'searched'])
@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'latin-1', 'cp437', 'utf-8'])
def test_a_console_shows_what_it_has(monkeypatch, encoding, option):
    out = console(encoding)
    monkeypatch.setattr(sys, 'stdout', out)
    words = ['generate', 'run', '--prompt', PROMPT, '--n_tokens', '24']
    assert cli.main([*words, *(option or ('--temperature', '2'))]) == 0
    assert shown(out).startswith(PROMPT.encode(encoding, 'replace').decode(encoding))
    assert (out.errors, sys.stdout) == ('strict', out)  # given back as it was


def test_messages_tell_letters_that_standard_error_lacks_by_number(monkeypatch, tmp_path):
    err = console('ascii')
    monkeypatch.setattr(sys, 'stderr', err)
    assert cli.main(['eval', str(tmp_path / 'läuf')]) == 2
    assert 'l\\xe4uf' in shown(err)


def test_streams_without_an_encoding(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)
    assert generate('--prompt', PROMPT) == 0
    assert out.getvalue().startswith(PROMPT) and '24 tokens' in err.getvalue()


def test_a_program_without_a_console(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    monkeypatch.setattr(sys, 'stderr', None)
    assert generate('--prompt', PROMPT) == 0
    assert cli.main(['eval', 'nothing']) == 2
    assert (sys.stdout, sys.stderr) == (None, None)


def test_a_closed_standard_output(monkeypatch):
    out = console('utf-8')
    out.close()
    monkeypatch.setattr(sys, 'stdout', out)
    assert generate('--prompt', PROMPT) == 0
    assert sys.stdout is out


def test_a_reader_that_has_gone_ends_quietly_without_a_descriptor(monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, 'stdout', Gone())
    assert generate('--prompt', PROMPT) == 0


def test_a_full_disk_under_standard_output_is_one_line(monkeypatch, capsys):
    class Full(io.BytesIO):
        full = True

        def write(self, _):
            if self.full:
                raise OSError(28, 'No space left on device')

    out = io.TextIOWrapper(Full(), 'utf-8')
    monkeypatch.setattr(sys, 'stdout', out)
    assert generate('--prompt', PROMPT) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith('layercomb: No space left on device: ')
    out.buffer.full = False


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_a_process_whose_standard_output_is_full():
    command = [sys.executable, '-m', 'layercomb', '--help']
    with open('/dev/full', 'w') as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert b'Traceback' not in done.stderr


def test_a_file_does_not_get_the_number_of_a_closed_standard_stream(tmp_path):
    code = (
        'import os\n'
        'from layercomb.__main__ import hold_descriptors\n'
        'for descriptor in (0, 1, 2):\n'
        '    os.close(descriptor)\n'
        'hold_descriptors()\n'
        f'with open({str(tmp_path / "x")!r}, "w", encoding="utf-8") as file:\n'
        '    os.write(2, b"what a library in C prints")\n'
        '    os._exit(0 if file.fileno() > 2 else 1)\n'
    )
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
    assert (tmp_path / 'x').read_bytes() == b''


def from_standard_input(monkeypatch, given, encoding='utf-8'):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(given), encoding))
    return terminal.read_prompt(None, None, True)


def from_file(path, given):
    path.write_bytes(given)
    return terminal.read_prompt(None, str(path), False)


TEXTS = {
    'a mark of UTF-8': (b'\xef\xbb\xbf' + PROMPT.encode(), PROMPT),
    'lines of Windows': (b'one\r\ntwo\r\n', 'one\ntwo\n'),
    'lines of old': (b'one\rtwo', 'one\ntwo'),
    'plain': (PROMPT.encode(), PROMPT),
    'NUL': (b'a\0b', 'a\0b'),
}


@pytest.mark.parametrize('text', TEXTS)
def test_a_prompt_is_utf8_from_a_file_and_from_standard_input(monkeypatch, tmp_path, text):
    given, wanted = TEXTS[text]
    assert from_file(tmp_path / 'läuf', given) == wanted
    for encoding in ('utf-8', 'cp1252', 'ascii'):
        assert from_standard_input(monkeypatch, given, encoding) == wanted


def test_standard_input_that_is_no_utf8_is_what_the_stream_declares(monkeypatch):
    assert from_standard_input(monkeypatch, 'läuf'.encode('cp1252'), 'cp1252') == 'läuf'


@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_a_prompt_that_is_no_text_is_refused(monkeypatch, tmp_path, encoding):
    for given in ('läuf'.encode('latin-1'), PROMPT.encode('utf-16')):
        with pytest.raises(UsageError, match=r'standard input: byte 0x.. at . is no UTF-8: conv'):
            from_standard_input(monkeypatch, given, encoding)
        with pytest.raises(UsageError, match=r"cannot read '.*p': byte 0x.. at . is no UTF-8: sav"):
            from_file(tmp_path / 'p', given)


@pytest.mark.parametrize('given', [b'', b'\xef\xbb\xbf'], ids=['nothing', 'a mark alone'])
def test_an_empty_prompt_is_refused(monkeypatch, tmp_path, given):
    with pytest.raises(UsageError, match='the prompt is empty'):
        from_standard_input(monkeypatch, given)
    with pytest.raises(UsageError, match='the prompt is empty'):
        from_file(tmp_path / 'p', given)


def test_no_standard_input_at_all(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, 'stdin', stdin)
        with pytest.raises(UsageError, match='there is no standard input: give --prompt'):
            terminal.read_prompt(None, None, True)


def test_a_prompt_file_that_is_a_directory(tmp_path):
    with pytest.raises(UsageError, match='Is a directory'):
        terminal.read_prompt(None, str(tmp_path), False)


def test_arguments_that_were_no_utf8_are_refused(capsys):
    assert generate('--prompt', 'a\udcff') == 2
    assert r"the prompt 'a\udcff' is no UTF-8" in capsys.readouterr().err
    words = ['inspect', 'reformer_python', '--gin_param', "train.sample_prompt='\udcff'"]
    assert cli.main(words) == 2
    assert 'is no UTF-8: check the encoding of the terminal' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['模型', 'läuf', '$a$b_$c', 'x\\frac{$', 'x\udcff', '👩‍🔬'])
def test_a_report_of_a_run_with_any_name(tmp_path, name):
    run = tmp_path / name
    log = reports.MetricsLog(run)
    for step in (1, 2):
        log.write({'step': step, 'train/loss': 2.0, '验证 $x$/loss': 1.0, '$_$/точность': 0.5})
    log.close()
    assert reports.write_report(run) == run / 'report.png'
    assert reports.read_metrics(run)[-1]['验证 $x$/loss'] == 1.0


def test_a_title_is_no_formula():
    figure = reports.draw([{'step': 1, 'train/loss': 2.0}], 'of $a_b$ and $c$')
    assert figure.texts[0].get_text() == 'of $a_b$ and $c$' and not figure.texts[0].get_parse_math()


def test_a_line_of_metrics_that_is_no_utf8_is_no_row(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2}\n')
    assert [row['step'] for row in reports.read_metrics(tmp_path)] == [1, 2]


def test_the_server_answers_under_a_name_in_any_letters(model, monkeypatch, tmp_path):
    from layercomb import serving

    names = []
    monkeypatch.setattr(serving, 'run', lambda *given: names.append(given[2]))
    for name in ('模型', 'läuf\udcff'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.gin').write_text('')
        assert cli.main(['serve', str(tmp_path / name), '--port', '0']) == 0
    assert names == ['模型', 'läuf�']
    assert all(json.dumps(name, ensure_ascii=False).encode() for name in names)  # as it answers


def test_an_export_of_a_configuration_in_any_letters(model, tmp_path):
    from layercomb import export

    text = f"cli.train.sample_prompt = '{PROMPT}'\n"
    export.write(model, tmp_path / '模型', text)
    assert (tmp_path / '模型' / 'config.gin').read_text('utf-8') == text


def test_every_text_file_of_the_library_is_read_and_written_as_utf8():
    """Python would take the encoding of the machine: what Windows writes, Linux could not read."""
    code = (
        'import numpy as np, optax, tempfile\n'
        'from layercomb import supervised, tl\n'
        'b = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)\n'
        't = supervised.TrainTask([b] * 3, tl.CrossEntropyLoss(), optax.sgd(0.1))\n'
        'd = tempfile.mkdtemp()\n'
        'supervised.Loop(tl.Dense(2), t, output_dir=d, progress=False).run(1)\n'
        'assert supervised.Loop(tl.Dense(2), t, output_dir=d, progress=False).step == 1\n'
    )
    done = subprocess.run(
        [sys.executable, '-X', 'warn_default_encoding', '-c', code],
        capture_output=True,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == 0, said
    library = str(Path(lc.__file__).parent)  # whatever else lies in a folder of its name
    assert [x for x in said.splitlines() if x.startswith(library) and 'EncodingWarning' in x] == []


def test_bytes_of_documents_stay_as_they_are(tmp_path):
    from layercomb import data

    given = b'\xef\xbb\xbfone\r\ntwo'
    (tmp_path / 'a.txt').write_bytes(given)
    assert list(data.text_files(tmp_path)) == [given]
    np.testing.assert_array_equal(ByteTokenizer().encode(given), list(given))
