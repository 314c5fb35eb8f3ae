"""Contestants that take turns: each a warm process of its own, which runs a step when asked.

CPU seconds are those of all threads. Memory is the peak of the process above what it held before
its first step, so that neither libraries nor weights count, or above what its worker says.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

# The allocators that a contestant is given; the best of them counts.
KEEP_PAGES = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '100000000000'}
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
UNDISTURBED = 0.15  # of a CPU, that other processes take during a turn
# Threads of torch that wait without spinning: what they burn would count as work.
TORCH = {'OMP_WAIT_POLICY': 'PASSIVE'}


def serve(make_step, *args, above=None):
    """The worker: a step for every line that comes in, and a line of figures for every step.

    Args:
      make_step: returns a function that runs a step and returns its loss, and the bytes of
        temporaries where the compiler tells, else None.
      *args: its arguments.
      above: bytes above which memory counts; None for what is held before the first step.
    """
    step, temporaries = make_step(*args)
    base = resident_bytes() if above is None else above
    step()
    print(json.dumps({'temporaries': temporaries}), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
        print(json.dumps({'cpu': cpu, 'wall': wall, 'loss': loss, 'peak': peak}), flush=True)


def resident_bytes():
    """What this process holds now."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


class Worker:
    """A warm process: this script run again with ``--worker CONTESTANT`` and `arguments`.

    `python` is another interpreter, for a contestant whose libraries are not in this one.
    """

    def __init__(self, contestant, environment, arguments, python=sys.executable):
        self.process = subprocess.Popen(
            [python, sys.argv[0], '--worker', contestant, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.said = self.read()  # when it was ready
        self.steps = []

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit('a worker stopped: what it wrote stands above')
        return json.loads(line)

    @property
    def temporaries(self):
        return self.said['temporaries']

    def run(self, job='step'):
        self.process.stdin.write(f'{job}\n')
        self.process.stdin.flush()
        self.steps.append(self.read())
        return self.steps[-1]

    def best(self, what):
        return min(step[what] for step in self.steps)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def take_turns(contestants, repeats, *arguments):
    """Runs every contestant once, then again, `repeats` times in all.

    Args:
      contestants: a dict from a label to (contestant, environment), or to these and a Python.
      repeats: how many steps each runs, after a first that does not count.
      *arguments: of the script.

    Returns:
      A dict from the labels to workers that have run.
    """
    workers = {
        label: Worker(name, environment, arguments, *python)
        for label, (name, environment, *python) in contestants.items()
    }
    for _ in range(repeats):
        for worker in workers.values():
            worker.run()
    for worker in workers.values():
        worker.close()
    return workers


def busy_seconds():
    """CPU seconds that all processes of the machine have had."""
    with open('/proc/stat') as f:
        user, nice, system, _, _, *interrupts = map(int, f.readline().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf('SC_CLK_TCK')


def take_quiet_turn(worker, job, seconds):
    """Does a job when nobody else computes, or after so many seconds; says what others took."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        busy, wall = busy_seconds(), time.perf_counter()
        time.sleep(0.15)
        if busy_seconds() - busy < 0.2 * (time.perf_counter() - wall):
            break
    busy, wall = busy_seconds(), time.perf_counter()
    answer = worker.run(job)
    answer['others'] = busy_seconds() - busy - answer['cpu']
    answer['others'] /= time.perf_counter() - wall


def counted(turns):
    """The turns that nobody disturbed, or else the half that was disturbed less."""
    quiet = [turn for turn in turns if turn['others'] < UNDISTURBED]
    return quiet or sorted(turns, key=lambda turn: turn['others'])[: (len(turns) + 1) // 2]
