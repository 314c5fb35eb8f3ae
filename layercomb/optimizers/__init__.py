"""Optimizers: recipes over optax, and what optax lacks."""

from layercomb.optimizers.recipes import adafactor, adamw, muon, warmup_cosine

__all__ = ['adafactor', 'adamw', 'muon', 'warmup_cosine']
