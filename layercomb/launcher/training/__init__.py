"""Runs of the training commands: their devices, their start, and their end."""
