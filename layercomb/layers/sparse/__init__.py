"""Sparse layers: a position uses only a part of the weights, or the weights are few."""
