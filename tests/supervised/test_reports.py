from __future__ import annotations

import io
import json
import math
import re

import pytest
from tiny_run import eval_task, loop

from layercomb import UsageError
from layercomb.supervised.progress import Progress, Throughput
from layercomb.supervised.reports import MetricsLog, draw, read_metrics, write_report


def rows(n):
    return [
        {
            'step': step,
            'train/loss': 1 + 4 * math.exp(-step / 30) + 0.1 * (step % 3),
            'train/grad_norm': 2.0,
            **({'valid/loss': 2.0, 'valid/accuracy': 0.5} if step % 10 == 0 else {}),
        }
        for step in range(1, n + 1)
    ]


def logged(directory, rows, step=0):
    log = MetricsLog(directory, step)
    for row in rows:
        log.write(row)
    log.close()


def test_a_row_is_a_line(tmp_path):
    logged(tmp_path, [{'step': 1, 'train/loss': 2.5}, {'step': 2, 'train/loss': math.nan}])
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
    assert lines == ['{"step": 1, "train/loss": 2.5}', '{"step": 2, "train/loss": null}']


def test_what_follows_the_step_is_dropped(tmp_path):
    logged(tmp_path, rows(6))
    logged(tmp_path, rows(7)[4:], step=4)
    assert read_metrics(tmp_path) == rows(7)


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    logged(tmp_path, rows(3))
    logged(tmp_path, rows(5)[3:], step=3)
    found = {}
    for file in sorted(tmp_path.glob('events.out.tfevents.*')):
        content, at = file.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], 'little')
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                found[event.step, value.tag] = value.simple_value
    assert found[5, 'train/loss'] == pytest.approx(rows(5)[4]['train/loss'])
    assert {step for step, _ in found} == {1, 2, 3, 4, 5}


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match=r'cannot write to .*: choose another output_dir'):
        MetricsLog(tmp_path / 'file')


def test_the_picture_has_a_panel_for_each_metric():
    figure = draw(rows(200), 'my run')
    titles = [axes.get_title(loc='left') for axes in figure.axes]
    assert titles == ['loss', 'accuracy', 'grad norm']
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == 'my run'
    assert re.search(r'step 200 .* train loss 1.205 .* valid loss 2 .* accuracy 0.5', texts[1])
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ['train  1.205', 'valid  2']


def test_the_picture_is_a_file(tmp_path):
    assert write_report(tmp_path) is None
    logged(tmp_path, rows(1))
    path = write_report(tmp_path)
    assert path == tmp_path / 'report.png'
    assert path.read_bytes().startswith(b'\x89PNG')


def test_throughput_does_not_count_compilation_and_pauses(monkeypatch):
    times = iter([100.0, 101.0, 102.0, 500.0, 501.0])
    monkeypatch.setattr('time.perf_counter', lambda: next(times))
    throughput = Throughput()
    assert throughput.tokens_per_second() is None
    for _ in range(3):
        throughput.step(10)
    throughput.pause()
    assert throughput.tokens_per_second() == 10
    throughput.step(10)
    assert throughput.tokens_per_second() is None
    throughput.step(30)
    assert throughput.tokens_per_second() == 30
    assert throughput.seconds_left(6) == 6


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    loop(tmp_path, eval_tasks=eval_task(), progress=out, eval_every=40).run(80)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r'step 1/80  loss \d\.\d{4}', lines[0])
    assert re.fullmatch(r'step 40/80  loss \S+  [\d,]+ tokens/s  0:0\d left', lines[-4])
    evaluated = r'step 80/80  valid/loss \S+  valid/accuracy \S+  valid/bits_per_byte \S+'
    assert re.fullmatch(evaluated, lines[-1])
    assert len(lines) < 20
    assert (tmp_path / 'report.png').stat().st_size > 10_000
    assert read_metrics(tmp_path)[-1]['step'] == 80


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    progress = Progress(2, 4, out)
    progress.step()
    progress.step()
    row = {'step': 4, 'train/loss': 1.5, 'train/tokens_per_second': 12345.0, 'valid/loss': 2.0}
    progress.row(row, seconds_left=3723)
    progress.close()
    assert 'loss 1.5000  12,345 tokens/s  1:02:03 left' in out.getvalue()
    assert 'step 4/4  valid/loss 2.0000\n' in out.getvalue()
    assert '4/4' in out.getvalue()
