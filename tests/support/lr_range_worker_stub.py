"""A worker of a learning-rate range test without a model: some steps of a curve, then it waits to be killed.

``python -m tests.support.lr_range_worker_stub FOLDER``; with ``LR_RANGE_STEPS`` in the environment it ends
after that many steps.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from msgspec import structs

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.lr_range import LrRange, RangeSettings, RangeStep, read_lr_range, write_lr_range
from qlora_tui.worker_messages import send_progress

SHOWN_STEPS = 24


def curve_steps(settings: RangeSettings, fall: float = 0.4) -> tuple[RangeStep, ...]:
    """Steps whose loss is lowest at a rate of 4e-3, where it has fallen by ``fall``, and diverges at 3e-2.

    The batches are very different, and the differences from their untrained losses are not.
    """
    steps = []
    for number in range(settings.steps):
        rate, untrained = settings.rate(number), (1.2, 2.4, 1.8)[number % 3]
        change = -fall * min(1.0, rate / 4e-3) + max(0.0, rate / 4e-3 - 1) * 0.2
        wobble = (0.002, -0.002)[number % 2]
        steps.append(RangeStep(rate, untrained + change + wobble, untrained))
        if rate > 3e-2:
            break
    return tuple(steps)


def main() -> None:
    """Write steps to the folder's test, one after another."""
    path = RunDir(Path(sys.argv[1])).lr_range_path
    lr_range = read_lr_range(path)
    assert isinstance(lr_range, LrRange)
    steps = curve_steps(lr_range.settings)
    last = int(os.environ.get("LR_RANGE_STEPS", SHOWN_STEPS))
    total = lr_range.settings.steps
    for number in range(1, last + 1):
        write_lr_range(path, structs.replace(lr_range, steps=steps[:number], seconds=float(number)))
        send_progress(total + number, 2 * total)
    if "LR_RANGE_STEPS" not in os.environ:
        signal.pause()


if __name__ == "__main__":
    main()
