"""Optimizers: recipes over optax, and what optax lacks."""

from layercomb.optimizers.recipes import adamw, muon, warmup_cosine

__all__ = ['adamw', 'muon', 'warmup_cosine']
