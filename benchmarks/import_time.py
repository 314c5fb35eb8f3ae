"""What `import layercomb` costs beside `import jax`, in processes of their own, alternately.

python benchmarks/import_time.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

import machine


def cpu_seconds(code: str) -> float:
    """CPU seconds, over all threads, of a process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=9)
    options = parser.parse_args()
    print(machine.describe('jaxlib'))
    statements = ('import layercomb', 'import jax')
    for statement in statements:
        cpu_seconds(statement)
    pairs = [tuple(map(cpu_seconds, statements)) for _ in range(options.rounds)]
    ours, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f'CPU seconds: {ours:.3f} import layercomb, {theirs:.3f} import jax; ratio {ratio:.3f}  '
        '(at most 1.3)'
    )


if __name__ == '__main__':
    main()
