"""Models: functions that return layers."""

from layercomb.models.bert import BERT
from layercomb.models.fnet import FNet
from layercomb.models.gemma import Gemma2, Gemma3
from layercomb.models.gpt2 import GPT2
from layercomb.models.llama import Llama
from layercomb.models.marian import Marian
from layercomb.models.mlp import MLP
from layercomb.models.qwen import Qwen2, Qwen3
from layercomb.models.reformer import ReformerLM
from layercomb.models.reformer_seq2seq import Reformer
from layercomb.models.revnet import RevNet
from layercomb.models.t5 import T5
from layercomb.models.terraformer import Terraformer, TerraformerLM
from layercomb.models.transformer import TransformerEncoder, TransformerLM
from layercomb.models.transformer_seq2seq import Transformer

__all__ = [
    'BERT',
    'GPT2',
    'MLP',
    'T5',
    'FNet',
    'Gemma2',
    'Gemma3',
    'Llama',
    'Marian',
    'Qwen2',
    'Qwen3',
    'Reformer',
    'ReformerLM',
    'RevNet',
    'Terraformer',
    'TerraformerLM',
    'Transformer',
    'TransformerEncoder',
    'TransformerLM',
]
