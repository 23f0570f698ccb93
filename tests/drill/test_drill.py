"""The fault drill reports what must not happen, and a short one with a fixed seed finds nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench.drill.damage import damaged
from bench.drill.program import MEMORY_BYTES, Ended, Failure
from bench.drill.samples import DATA

ROOT = Path(__file__).parents[2]
QUICK_ROWS = [
    *("damaged data", "damaged preset", "damaged settings", "damaged model", "damaged GGUF", "damaged run"),
    *("command line", "terminal", "template", "code", "names"),
]
ATTEMPTS = 12


def ended(
    *, code: int = 0, output: str = "fine\n", peak_bytes: int = 1 << 20, timed_out: bool = False
) -> Ended:
    return Ended(("runs",), code, output, 1.0, peak_bytes, timed_out)


def test_a_call_that_ends_well_is_no_failure() -> None:
    ended().check()
    ended(code=1, output="qlora-tui: No such run\n").check()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ended(code=-11), "SIGSEGV"),
        (ended(code=3), "ended with 3"),
        (ended(timed_out=True), "still running"),
        (ended(code=1, output="Traceback (most recent call last):\n"), "Traceback"),
        (ended(code=1, output="qlora-tui: Internal error: KeyError\n"), "Internal error"),
        (ended(output="a\x1b[2Jb"), "x1b"),
        (ended(output="a\x9b2Jb"), "x9b"),
        (ended(output="a\u202eb"), "u202e"),
        (ended(peak_bytes=MEMORY_BYTES + 1), "1024 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_must_not_happen_is_a_failure(wrong: Ended, said: str) -> None:
    with pytest.raises(Failure, match=said):
        wrong.check()


def test_damage_depends_on_the_seed_alone() -> None:
    for name, sample in DATA.items():
        content = sample()
        results = [damaged(content, random.Random(seed)) for seed in range(20)]
        assert results == [damaged(content, random.Random(seed)) for seed in range(20)], name
        assert sum(result != content for result in results) > 15, name


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
def test_a_short_drill_with_a_fixed_seed_finds_nothing() -> None:
    command = [sys.executable, "-m", "bench.drill", "--json", "--attempts", f"{ATTEMPTS}", "--seed", "14"]
    done = subprocess.run([*command, "--only", *QUICK_ROWS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert sum(row["tried"] for row in table.values()) == ATTEMPTS
