"""The command line of the drill: see :mod:`bench.drill`."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.drill import runs, samples
from bench.drill.home import private_home
from bench.drill.program import Failure
from bench.drill.rows import ROWS


def main() -> int:
    """Try rows at random until the time is over; 1 where an attempt failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.drill", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--attempts", type=int, help="stop after this many")
    parser.add_argument("--seed", type=int, help="repeat what an earlier drill printed")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", action="store_true", help="the table as JSON on stdout")
    given = parser.parse_args()
    names = [name for name in given.only if not (obstacle := ROWS[name].obstacle()) or _skip(name, obstacle)]
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr)
    chooser = random.Random(seed)
    tried = dict.fromkeys(names, 0)
    failures: dict[str, list[str]] = {name: [] for name in names}
    until = time.monotonic() + 60 * given.minutes
    with _materials() as materials:
        while time.monotonic() < until and (given.attempts is None or sum(tried.values()) < given.attempts):
            name = chooser.choices(names, [ROWS[row].weight for row in names])[0]
            attempt_seed = seed if given.attempts == 1 else chooser.randrange(1 << 32)
            tried[name] += 1
            with private_home() as home:
                try:
                    ROWS[name].attempt(random.Random(attempt_seed), materials, home)
                except Failure as failure:
                    failures[name].append(f"--only {name!r} --attempts 1 --seed {attempt_seed}: {failure}")
                    print(f"{name}: {failures[name][-1]}", file=sys.stderr)
    _show(tried, failures, as_json=given.json)
    return 1 if any(failures.values()) else 0


def _skip(name: str, obstacle: str) -> bool:
    print(f"{name}: skipped: {obstacle}", file=sys.stderr)
    return False


@contextmanager
def _materials() -> Iterator[Path]:
    """A folder with a tiny model, a GGUF file and a finished run; the working directory meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="qlora-tui-drill-materials-"))
    before = Path.cwd()
    try:
        samples.make_model_files(folder)
        os.chdir(folder)
        with private_home() as home, runs.started(folder, home) as run:
            runs.resume_to_the_end(run, most=0)
            shutil.copytree(run.path, folder / "run")
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _show(tried: dict[str, int], failures: dict[str, list[str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {"tried": tried[name], "failed": failures[name]} for name in tried}))
        return
    print(f"{'row':<18}{'tried':>7}{'failed':>8}")
    for name, count in tried.items():
        print(f"{name:<18}{count:>7}{len(failures[name]):>8}")


if __name__ == "__main__":
    sys.exit(main())
