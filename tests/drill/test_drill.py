"""The fault drill tells what is wrong, whatever it is that must not happen."""

from __future__ import annotations

import random

import pytest

from bench.drill.damage import damaged
from bench.drill.program import MEMORY_BYTES, Ended, Failure
from bench.drill.samples import DATA


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
        (ended(code=1, output="qlora-tui: A mistake of ours: KeyError\n"), "mistake of ours"),
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
