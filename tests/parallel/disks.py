"""Runs on disks that become full: what tests call in each process."""

from __future__ import annotations

import argparse
import resource

import damages
import jax

from layercomb import supervised
from layercomb.launcher.training import devices

_OPTIONS = dict.fromkeys(('coordinator_address', 'num_processes', 'process_id'))


class Full(supervised.Callback):
    """Some processes can write no more after a step that is saved."""

    def __init__(self, which):
        self.which = which

    def after_step(self, loop, row):
        if row['step'] == 5 and jax.process_index() in self.which:
            loop._checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def fill(directory, which):
    """Trains until the disk is full, as the command does."""
    options = argparse.Namespace(distributed=jax.process_count() > 1, **_OPTIONS)
    with devices.together(options):
        damages.loop_on_all(directory, keep=10**6, callbacks=(Full(which),)).run(10**6)
