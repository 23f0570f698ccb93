"""What is tried, by name, with how often beside the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.drill import damaged, disk, hostile, kills, power


@dataclass(frozen=True)
class Row:
    """One kind of mishap."""

    attempt: Callable[[random.Random, Path, Path], None]
    """Takes the source of all chance, the prepared materials and a private home; raises Failure."""
    weight: float
    """How often it is chosen. One that starts trainers takes half a minute, the others a second."""
    obstacle: Callable[[], str] = lambda: ""
    """Says why this machine cannot try it; empty where it can."""


ROWS: dict[str, Row] = {
    "damaged data": Row(damaged.data_file, 6),
    "damaged preset": Row(damaged.preset, 2),
    "damaged settings": Row(damaged.settings, 1),
    "damaged model": Row(damaged.model_file, 3),
    "damaged GGUF": Row(damaged.gguf, 2),
    "damaged run": Row(damaged.run_file, 4),
    "command line": Row(damaged.command_line, 1),
    "terminal": Row(hostile.terminal, 2),
    "template": Row(hostile.template, 2),
    "bomb": Row(hostile.bomb, 0.5),
    "code": Row(hostile.code, 1),
    "names": Row(hostile.names, 1),
    "kill -9": Row(kills.killed, 1),
    "resume at once": Row(kills.resumed_at_once, 0.5),
    "signal": Row(kills.signalled, 0.5),
    "killed verb": Row(kills.killed_verb, 1),
    "failing write": Row(disk.failing_write, 1),
    **{f"power cut, {kind}": Row(power.cut_while_active(kind), 0.3, power.obstacle) for kind in power.MIB},
    **{f"end and cut, {kind}": Row(power.cut_after_the_end(kind), 0.3, power.obstacle) for kind in power.MIB},
}
