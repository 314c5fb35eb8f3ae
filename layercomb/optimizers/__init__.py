"""Optimizers: recipes over optax, and what optax lacks."""

from layercomb.optimizers.recipes import adamw, warmup_cosine

__all__ = ['adamw', 'warmup_cosine']
