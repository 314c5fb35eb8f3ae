"""Matrices of narrow weights, and the native kernels that read them."""
