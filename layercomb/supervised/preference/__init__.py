"""Preference tuning: what the model that training starts from thinks of the answers."""
