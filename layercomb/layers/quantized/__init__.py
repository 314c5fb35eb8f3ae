"""Matrices of narrow weights, and the native kernels that multiply by them."""
