"""Attention within buckets of a locality-sensitive hash."""
