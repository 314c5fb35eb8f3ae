"""Decoding together: rows in slots, prompts in pieces, and states that are used again."""
