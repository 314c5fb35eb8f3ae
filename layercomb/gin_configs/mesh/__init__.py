"""Meshes of devices, to be included after an experiment: ``include 'mesh/fsdp.gin'``."""
