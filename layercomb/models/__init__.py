"""Models: functions that return layers."""

from layercomb.models.mlp import MLP
from layercomb.models.reformer import ReformerLM
from layercomb.models.reformer_seq2seq import Reformer
from layercomb.models.revnet import RevNet
from layercomb.models.terraformer import Terraformer, TerraformerLM
from layercomb.models.transformer import TransformerEncoder, TransformerLM
from layercomb.models.transformer_seq2seq import Transformer

__all__ = [
    'MLP',
    'Reformer',
    'ReformerLM',
    'RevNet',
    'Terraformer',
    'TerraformerLM',
    'Transformer',
    'TransformerEncoder',
    'TransformerLM',
]
