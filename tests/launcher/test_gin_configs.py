"""Every configuration that comes with the library: whole when traced, and running when tiny."""

import importlib.resources
from pathlib import Path

import pytest

from layercomb import Model, cli
from layercomb.launcher import sources

FOLDER = Path(str(importlib.resources.files('layercomb.gin_configs')))
CONFIGS = sorted(path.stem for path in FOLDER.glob('*.gin'))

GPT2 = Path(__file__).parents[1] / 'data' / 'pretrained' / 'gpt2'
# A tiny model in the place of SmolLM2, and short rows.
OF_GPT2 = (f"SOURCE = '{GPT2}'", 'LENGTH = 64', 'MAX_LEN = 65')

# Sizes alone, so that two steps take seconds.
TINY = {
    'continue_text': (*OF_GPT2, f"data.text_folder.path = '{FOLDER}'"),
    'finetune_smollm2': OF_GPT2,
    'finetune_smollm2_lora': OF_GPT2,
    'finetune_minilm': (
        'LENGTH = 8',
        'train/data.batches.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
    ),
    'reformer_1m': (
        'models.ReformerLM.d_model = 16',
        'models.ReformerLM.d_ff = 16',
        'models.ReformerLM.n_layers = 1',
        'tl.HashedSelfAttention.chunk_len = 4',
        'tl.HashedSelfAttention.n_buckets = 4',
        'LENGTH = 16',
        'valid/data.packed.length = 16',
        'supervised.EvalTask.n_batches = 1',
    ),
    'reformer_duplication': (
        'models.ReformerLM.d_model = 16',
        'models.ReformerLM.d_ff = 16',
        'LENGTH = 16',
        'models.ReformerLM.chunk_len = 4',
        'train/data.batches.batch_size = 2',
        'valid/data.batches.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
    ),
    'reformer_enwik8': (
        'models.ReformerLM.d_model = 16',
        'models.ReformerLM.d_ff = 16',
        'models.ReformerLM.n_layers = 2',
        'models.ReformerLM.attention = (@tl.LocalSelfAttention(), @tl.HashedSelfAttention())',
        'models.ReformerLM.axial_shape = (4, 16)',
        'models.ReformerLM.axial_depths = (4, 12)',
        'LENGTH = 64',
        'tl.LocalSelfAttention.chunk_len = 8',
        'tl.HashedSelfAttention.chunk_len = 8',
        'train/data.packed.batch_size = 2',
        'supervised.TrainTask.accumulate = 2',
        'supervised.TrainTask.loss_chunk_len = 16',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_prompt = None',
    ),
    'reformer_imagenet64': (
        'models.ReformerLM.d_model = 16',
        'models.ReformerLM.d_ff = 16',
        'models.ReformerLM.n_layers = 2',
        'models.ReformerLM.axial_shape = (4, 12)',
        'models.ReformerLM.axial_depths = (4, 12)',
        'LENGTH = 48',
        'data.shapes.size = 4',
        'tl.LocalSelfAttention.chunk_len = 8',
        'tl.HashedSelfAttention.chunk_len = 8',
        'train/data.batches.batch_size = 2',
        'supervised.TrainTask.accumulate = 2',
        'supervised.TrainTask.loss_chunk_len = 16',
        'supervised.EvalTask.n_batches = 1',
    ),
    'reformer_python': (
        'models.ReformerLM.d_model = 16',
        'models.ReformerLM.d_ff = 16',
        'models.ReformerLM.n_layers = 2',
        'LENGTH = 16',
        'tl.HashedSelfAttention.chunk_len = 4',
        'train/data.packed.batch_size = 2',
        'valid/data.packed.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_tokens = 4',
    ),
    'revnet_cifar10': (
        'models.RevNet.widths = (4, 8)',
        'models.RevNet.n_blocks = 1',
        'data.shapes.size = 8',
        'test/data.shapes.n_examples = 8',
        'train/data.batches.batch_size = 4',
        'test/data.batches.batch_size = 4',
    ),
    'terraformer_arxiv': (
        'models.Terraformer.d_model = 16',
        'tl.MixtureFF.d_ff = 64',
        'models.Terraformer.n_encoder_layers = 1',
        'models.Terraformer.n_decoder_layers = 1',
        'tl.HashedSelfAttention.chunk_len = 4',
        'tl.HashedSelfAttention.local_len = 4',
        'SOURCE_LENGTH = 16',
        'TARGET_LENGTH = 8',
        'supervised.TrainTask.accumulate = 1',
        'train/data.batches.batch_size = 2',
        'valid/data.batches.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_prompt = None',
    ),
    'terraformer_c4_medium': (
        'models.Terraformer.d_model = 32',
        'models.Terraformer.d_ff = 64',
        'models.Terraformer.n_encoder_layers = 1',
        'models.Terraformer.n_decoder_layers = 1',
        'LENGTH = 8',
        'supervised.TrainTask.accumulate = 1',
        'train/data.batches.batch_size = 2',
        'valid/data.batches.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_prompt = None',
    ),
    'terraformer_copy': (
        'models.Terraformer.d_model = 16',
        'models.Terraformer.d_ff = 16',
        'models.Terraformer.n_decoder_layers = 1',
        'LENGTH = 8',
        'train/data.batches.batch_size = 2',
        'valid/data.batches.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
    ),
    'terraformer_python': (
        'models.TerraformerLM.d_model = 16',
        'tl.MixtureFF.d_ff = 32',
        'models.TerraformerLM.n_layers = 1',
        'LENGTH = 16',
        'train/data.packed.batch_size = 2',
        'valid/data.packed.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_tokens = 4',
    ),
    'transformer_python': (
        'models.TransformerLM.d_model = 16',
        'models.TransformerLM.d_ff = 16',
        'models.TransformerLM.n_layers = 1',
        'LENGTH = 16',
        'train/data.packed.batch_size = 2',
        'valid/data.packed.batch_size = 2',
        'supervised.EvalTask.n_batches = 1',
        'cli.train.sample_tokens = 4',
    ),
}


# Runs as others do, with other data and sizes: a nightly run takes these two steps.
LIKE_OTHERS = (
    'finetune_minilm',
    'revnet_cifar10',
    'reformer_1m',
    'reformer_duplication',
    'reformer_enwik8',
    'reformer_imagenet64',
    'terraformer_arxiv',
    'terraformer_c4_medium',
    'terraformer_copy',
    'terraformer_python',
    'transformer_python',
    'continue_text',
    'finetune_smollm2',
    'finetune_smollm2_lora',
)

# What starts from a model that a package carries.
FINETUNING = ('continue_text', 'finetune_smollm2', 'finetune_smollm2_lora')
OF_MINILM = ('finetune_minilm',)


def marked(*marks_of):
    """The configurations, with marks: pairs of a mark and the names that have it."""
    return [
        pytest.param(name, marks=[mark for mark, names in marks_of if name in names])
        for name in CONFIGS
    ]


def needs(name, of):
    """A mark for configurations that start from a package's model."""
    package = sources.PACKAGES[name]
    absent = package.path() is None
    return pytest.mark.skipif(absent, reason=f'needs the model {name}: {package.install}'), of


WITH_SMOLLM2, WITH_MINILM = needs('smollm2', FINETUNING), needs('minilm', OF_MINILM)


def test_every_config_has_a_row():
    assert set(TINY) == set(CONFIGS)


LARGE = ('terraformer_arxiv', 'terraformer_c4_medium', *FINETUNING, *OF_MINILM)


@pytest.mark.parametrize('name', marked((pytest.mark.slow, LARGE), WITH_SMOLLM2, WITH_MINILM))
def test_full_size_is_traced(name):
    file = cli.find_config(name)
    bindings = TINY[name][-1:] if name == 'continue_text' else ()  # a folder of text
    with cli.configured(file.read_text(), bindings, name, file) as config:
        experiment = config.build()
        experiment.check()
        weights, _ = experiment.abstract(experiment.batch_signature()[: experiment.net.n_in])
    assert weights


@pytest.mark.parametrize('name', marked((pytest.mark.slow, LIKE_OTHERS), WITH_MINILM))
def test_tiny_runs_two_steps(name, tmp_path, capsys):
    bindings = [x for b in (*TINY[name], 'train.steps = 2') for x in ('--gin_param', b)]
    assert cli.main(['train', name, '--output_dir', str(tmp_path / 'run'), *bindings]) == 0
    assert 'step 2: ' in capsys.readouterr().out
    assert (tmp_path / 'run' / 'report.png').exists()


@pytest.mark.parametrize('name', marked(WITH_MINILM))
def test_equal_when_built_twice(name):
    file = cli.find_config(name)
    bindings = OF_GPT2[:1] if name in FINETUNING else ()
    built = []
    for _ in range(2):
        with cli.configured(file.read_text(), bindings, name, file) as config:
            value = config.value('model')
            built.append(value.layer if isinstance(value, Model) else value)
    assert built[0] == built[1] and hash(built[0]) == hash(built[1])
