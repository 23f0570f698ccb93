"""What a trainer imports, plainly and in ``faster_imports()``: processor time and memory, in one run.

python -m bench.library_imports [--repeats N]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from bench.support.turns import in_turn

MODULE = "qlora_tui.training.attempt"
_MEASURE = (
    "import os, psutil; times = os.times();"
    "print(times.user + times.system, psutil.Process().memory_info().rss / 1e6)"
)
PROGRAMS = {
    "plain imports": f"import {MODULE}; {_MEASURE}",
    "faster_imports()": (
        "from qlora_tui.gpu.library_imports import faster_imports\n"
        f"with faster_imports(): import {MODULE}\n"
        f"{_MEASURE}"
    ),
}


def measure(program: str) -> tuple[float, float]:
    """Processor seconds and resident megabytes (10⁶ bytes) of a Python process that runs ``program``."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def main() -> int:
    """Measure, alternating; print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for program in PROGRAMS.values():
        measure(program)  # warms disk and byte code
    for repeat in range(args.repeats):
        for name in in_turn(PROGRAMS, repeat):
            results[name].append(measure(PROGRAMS[name]))
    for name, samples in results.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*samples, strict=True))
        print(f"{name:<18} {seconds:.2f} s of processor time   {megabytes:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
