"""Layers that run backwards, so that training keeps no activations."""
