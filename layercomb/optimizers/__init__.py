"""Optimizers: recipes over optax, and additions to it."""

from layercomb.optimizers.narrow import narrow_state
from layercomb.optimizers.recipes import adafactor, adamw, muon, warmup_cosine
from layercomb.optimizers.sm3 import sm3
from layercomb.optimizers.tensors import bound

__all__ = ['adafactor', 'adamw', 'bound', 'muon', 'narrow_state', 'sm3', 'warmup_cosine']
