"""`sparsify`: dense feed-forwards made mixtures of experts."""
