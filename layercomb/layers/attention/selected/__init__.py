"""Attention of each query to a set of keys of its own: by hashing, by blocks, and near by."""
