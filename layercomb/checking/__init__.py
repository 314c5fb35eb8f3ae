"""Checks of plain values and arguments, which know nothing of layers."""
