"""Models: functions that return layers."""

from layercomb.models.mlp import MLP
from layercomb.models.transformer import TransformerEncoder, TransformerLM

__all__ = ['MLP', 'TransformerEncoder', 'TransformerLM']
