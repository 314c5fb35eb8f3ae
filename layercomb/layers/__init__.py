"""All layers by name: ``from layercomb import tl``, then ``tl.Dense(512)``."""

from layercomb.layers.attention.by_head import by_head
from layercomb.layers.attention.cores import DotProductAttention, LocalAttention
from layercomb.layers.attention.functions import dot_product_attention, local_attention
from layercomb.layers.attention.layers import (
    CrossAttention,
    LocalSelfAttention,
    SelfAttention,
)
from layercomb.layers.attention.lsh.function import lsh_attention
from layercomb.layers.attention.lsh.hashing import lsh_buckets
from layercomb.layers.attention.lsh.layer import LSHAttention, LSHSelfAttention
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.attention.relative import RelativeBias
from layercomb.layers.attention.selected.blocks import BlockAttention
from layercomb.layers.attention.selected.choice import chosen_blocks
from layercomb.layers.attention.selected.function import selected_attention
from layercomb.layers.attention.selected.hashed import HashedAttention
from layercomb.layers.attention.selected.keys import KeyConv, UnitNorm
from layercomb.layers.attention.selected.mixed import MixedAttention
from layercomb.layers.attention.selected.multihead import (
    BlockSelfAttention,
    HashedSelfAttention,
    MixedSelfAttention,
)
from layercomb.layers.basic.activations import (
    Activation,
    Elu,
    ExactGelu,
    Gelu,
    HardSigmoid,
    LeakyRelu,
    LogSoftmax,
    Relu,
    Relu2,
    Sigmoid,
    Silu,
    SoftCap,
    Softmax,
    Softplus,
    Tanh,
    activation,
)
from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.basic.convolution import Conv1D, Conv2D
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.basic.embedding import Embedding
from layercomb.layers.basic.fn import Fn
from layercomb.layers.basic.fourier import FourierMixing
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.basic.initializers import (
    Constant,
    Initializer,
    Normal,
    Orthogonal,
    Uniform,
    VarianceScaling,
    glorot_uniform,
    he_normal,
    lecun_normal,
    ones,
    zeros,
)
from layercomb.layers.basic.masks import PaddingMask
from layercomb.layers.basic.normalization import BatchNorm, LayerNorm, RMSNorm
from layercomb.layers.basic.pooling import AvgPool, MaxPool
from layercomb.layers.basic.recurrent.both_ways import Bidirectional, Reverse
from layercomb.layers.basic.recurrent.gated import GRU, LSTM
from layercomb.layers.basic.recurrent.sru import SRU
from layercomb.layers.basic.reduce import Flatten, Mean
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.residual import Add, Residual
from layercomb.layers.combinators.routing import (
    Concatenate,
    Drop,
    Dup,
    Multiply,
    Select,
    Split,
    Swap,
)
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.combinators.side_by_side import Branch, Parallel
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.once import Once
from layercomb.layers.decoding.seek import Position, seek
from layercomb.layers.facts.devices import over_rows, own_key
from layercomb.layers.facts.sequence import (
    all_positions,
    first_position,
    over_positions,
    surrounded,
)
from layercomb.layers.metrics.class_names import ClassNames
from layercomb.layers.metrics.classification import (
    Accuracy,
    BitsPerByte,
    CrossEntropyLoss,
    MaskedSequenceAccuracy,
    Perplexity,
    SequenceAccuracy,
    cross_entropy,
)
from layercomb.layers.metrics.counts import F1, BinaryF1, ConfusionMatrix
from layercomb.layers.metrics.metric import Metric, weighted_mean, weighted_sum
from layercomb.layers.metrics.preference import PreferenceAccuracy, PreferenceLoss, RewardMargin
from layercomb.layers.metrics.regression import (
    BinaryAccuracy,
    BinaryCrossEntropyLoss,
    L2Loss,
    SmoothL1Loss,
)
from layercomb.layers.positions.axial import AxialPositions
from layercomb.layers.positions.learned import LearnedPositions
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.positions.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryScaling,
    YarnScaling,
)
from layercomb.layers.positions.sinusoidal import SinusoidalPositions
from layercomb.layers.reversible.bidirectional import BidirectionalRepeat
from layercomb.layers.reversible.layers import (
    Reversible,
    ReversibleConcatenatePair,
    ReversibleHalfResidual,
    ReversibleSelect,
    ReversibleSwap,
)
from layercomb.layers.reversible.one_pass import is_diagonal, one_pass, recomputes
from layercomb.layers.reversible.stack import ReversibleRepeat, ReversibleSerial
from layercomb.layers.sparse.attention import FoldHeads, SparseQKVAttention, UnfoldHeads, sparse_qkv
from layercomb.layers.sparse.block_sparse import BlockSparseFF
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.local_conv import LocalConv
from layercomb.layers.sparse.low_rank import LowRankDense
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.sparse.multiplicative import (
    MultiplicativeDense,
    MultiplicativeHead,
    multiplicative_dense,
)
from layercomb.layers.sparse.switch import SwitchFF
from layercomb.layers.state.counted import counted_positions, put_counted, take_counted
from layercomb.layers.state.decisions import decide
from layercomb.layers.state.parts import AuxLoss
from layercomb.layers.state.segments import segments_of

__all__ = [
    'F1',
    'GRU',
    'LSTM',
    'SRU',
    'Accuracy',
    'Activation',
    'Add',
    'AssertShape',
    'AuxLoss',
    'AvgPool',
    'AxialPositions',
    'BatchNorm',
    'Bidirectional',
    'BidirectionalRepeat',
    'BinaryAccuracy',
    'BinaryCrossEntropyLoss',
    'BinaryF1',
    'BitsPerByte',
    'BlockAttention',
    'BlockSelfAttention',
    'BlockSparseFF',
    'Branch',
    'Chunk',
    'ClassNames',
    'Combinator',
    'Concatenate',
    'ConfusionMatrix',
    'Constant',
    'Conv1D',
    'Conv2D',
    'CrossAttention',
    'CrossEntropyLoss',
    'Dense',
    'DotProductAttention',
    'Drop',
    'Dropout',
    'Dup',
    'DynamicScaling',
    'Elu',
    'Embedding',
    'ExactGelu',
    'Flatten',
    'Fn',
    'FoldHeads',
    'FourierMixing',
    'GatedDense',
    'Gelu',
    'HardSigmoid',
    'HashedAttention',
    'HashedSelfAttention',
    'Initializer',
    'KeyConv',
    'L2Loss',
    'LSHAttention',
    'LSHSelfAttention',
    'Layer',
    'LayerNorm',
    'LeakyRelu',
    'LearnedPositions',
    'LinearScaling',
    'Llama3Scaling',
    'LocalAttention',
    'LocalConv',
    'LocalSelfAttention',
    'LogSoftmax',
    'LongRopeScaling',
    'LowRankDense',
    'Map',
    'MaskedSequenceAccuracy',
    'MaxPool',
    'Mean',
    'MergeHeads',
    'Metric',
    'MixedAttention',
    'MixedSelfAttention',
    'MixtureFF',
    'Mode',
    'MultiplicativeDense',
    'MultiplicativeHead',
    'Multiply',
    'Normal',
    'Once',
    'Orthogonal',
    'PaddingMask',
    'Parallel',
    'Perplexity',
    'Position',
    'PreferenceAccuracy',
    'PreferenceLoss',
    'RMSNorm',
    'RelativeBias',
    'Relu',
    'Relu2',
    'Remat',
    'Repeat',
    'Residual',
    'Reverse',
    'Reversible',
    'ReversibleConcatenatePair',
    'ReversibleHalfResidual',
    'ReversibleRepeat',
    'ReversibleSelect',
    'ReversibleSerial',
    'ReversibleSwap',
    'RewardMargin',
    'RotaryPositions',
    'RotaryScaling',
    'Select',
    'SelfAttention',
    'SequenceAccuracy',
    'Serial',
    'Sigmoid',
    'Silu',
    'SinusoidalPositions',
    'SmoothL1Loss',
    'SoftCap',
    'Softmax',
    'Softplus',
    'SparseFF',
    'SparseQKVAttention',
    'Split',
    'SplitHeads',
    'Swap',
    'SwitchFF',
    'Tanh',
    'UnfoldHeads',
    'Uniform',
    'UnitNorm',
    'VarianceScaling',
    'Wrapper',
    'YarnScaling',
    'activation',
    'all_positions',
    'by_head',
    'chosen_blocks',
    'counted_positions',
    'cross_entropy',
    'decide',
    'dot_product_attention',
    'first_position',
    'glorot_uniform',
    'he_normal',
    'is_diagonal',
    'lecun_normal',
    'local_attention',
    'lsh_attention',
    'lsh_buckets',
    'multiplicative_dense',
    'one_pass',
    'ones',
    'over_positions',
    'over_rows',
    'own_key',
    'put_counted',
    'recomputes',
    'seek',
    'segments_of',
    'selected_attention',
    'sparse_qkv',
    'surrounded',
    'take_counted',
    'weighted_mean',
    'weighted_sum',
    'zeros',
]
