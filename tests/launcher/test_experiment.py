"""An experiment's defaults are stated once, and gin knows them."""

from __future__ import annotations

import inspect

import optax
import pytest

from layercomb import cli, tl
from layercomb.launcher.experiment import Experiment
from layercomb.supervised import Callback, EvalTask, Loop, TrainTask

TASK = TrainTask([], tl.CrossEntropyLoss(), optax.sgd(0.1))
NET = tl.Dense(3)


def test_train_is_described_by_the_fields_of_an_experiment():
    of_train, fields = (inspect.signature(f).parameters for f in (cli.train, Experiment))
    assert of_train == fields
    of_loop = inspect.signature(Loop).parameters
    shared = fields.keys() & of_loop.keys()
    assert {'seed', 'eval_every', 'checkpoint_every', 'log_every', 'keep', 'keep_best'} < shared
    for name in shared - {'model', 'train_task'}:
        assert fields[name].default == of_loop[name].default
    arguments = inspect.getfullargspec(cli.train)
    assert arguments.args == ['model', 'train_task', 'eval_tasks']
    assert arguments.kwonlydefaults['steps'] == 1000 and arguments.kwonlydefaults['keep'] == 3


def test_one_task_is_a_tuple_and_the_rest_is_checked():
    task = EvalTask([], tl.Accuracy())
    callback = Callback()
    options = {'keep_best': 'valid/accuracy', 'callbacks': [callback], 'seed': 7}
    made = cli.train(NET, TASK, task, **options)
    assert made.eval_tasks == (task,) and made.callbacks == (callback,)
    with pytest.raises(ValueError, match=r"keep_best='x' is not measured: there are valid/accura"):
        cli.train(NET, TASK, task, keep_best='x')
    with pytest.raises(TypeError, match='callbacks'):
        cli.train(NET, TASK, callbacks=3)
