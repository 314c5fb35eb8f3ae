"""Attention of sequences whose positions several devices split."""
