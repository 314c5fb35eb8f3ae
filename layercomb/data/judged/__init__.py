"""Texts that were judged: labels of texts, and preferences between answers."""
