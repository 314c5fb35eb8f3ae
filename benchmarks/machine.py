"""What every benchmark prints first: the machine and the versions it ran with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys


def describe(*packages: str) -> str:
    """One line: date, processor, cores, Python, and the versions of some packages."""
    versions = []
    for name in ('jax', *packages):
        try:
            versions.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            versions.append(f'{name} absent')
    python = '.'.join(map(str, sys.version_info[:3]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    today = datetime.date.today().isoformat()
    load = os.getloadavg()[0]
    return (
        f'{today} · {_processor()}, {cores} cores · Python {python} · {" · ".join(versions)} · '
        f'load {load:.1f} at the start'
    )


def _processor() -> str:
    try:
        with open('/proc/cpuinfo') as f:
            names = [line.split(':', 1)[1].strip() for line in f if line.startswith('model name')]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
