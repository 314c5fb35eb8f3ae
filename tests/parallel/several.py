"""Several processes on this machine that call one function together; also run as a program."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

_ANSWER = 'answer: '


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def started(n, function, *args):
    """Starts n processes, of one device each, that call a function of a module beside this one."""
    address = f'127.0.0.1:{free_port()}'
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    env['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    said = address, str(n), function.__module__, function.__name__, json.dumps(args)
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(i), *said],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(n)
    ]


def together(n, function, *args, timeout=240):
    """What the function returned in each process; it must be JSON."""
    processes = started(n, function, *args)
    try:
        made = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * n, made
    return [json.loads(out.rsplit(_ANSWER, 1)[1]) for out, _ in made]


if __name__ == '__main__':
    number, address, n, module, name, args = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    import jax

    jax.config.update('jax_numpy_dtype_promotion', 'strict')
    jax.distributed.initialize(address, int(n), int(number))
    made = getattr(importlib.import_module(module), name)(*json.loads(args))
    print(_ANSWER + json.dumps(made), flush=True)
