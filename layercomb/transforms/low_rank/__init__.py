"""A minimal stand-in, to be replaced."""
