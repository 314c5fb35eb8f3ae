"""Tests of several devices run in a process of their own, where there are eight."""

import concurrent.futures
import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the process, which imports by name

import worker


@pytest.fixture(scope='session')
def pool():
    """A process with eight devices."""
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, context, worker.begin) as executor:
        yield executor


@pytest.fixture
def eight(pool):
    """Calls a function of a module, with arguments, where there are eight devices."""

    def run(function, *args):
        return pool.submit(worker.quick, function, *args).result()

    return run


@pytest.fixture
def eight_optimized(pool):
    """The same, compiled as users' programs are: for tests of memory and programs."""

    def run(function, *args):
        return pool.submit(worker.optimizing, function, *args).result()

    return run
