"""Rows of the drill: failing writes of a real trainer, by Python, torch or safetensors."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from bench.drill import runs
from bench.drill.program import Failure
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Failed

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
FOR_GOOD = 1_000_000
_WRITES = 900
"""About as many calls as a run of this drill makes that write."""


def failing_write(luck: random.Random, materials: Path, home: Path) -> None:
    """The n-th write of a trainer fails, and some or all after it: no run is lost."""
    count = luck.choice((1, 1, 5, 40, FOR_GOOD))
    with runs.started(
        materials,
        home,
        {
            "LD_PRELOAD": str(library()),
            "DRILL_FOLDER": str(home / "state" / "qlora-tui" / "runs"),
            "DRILL_PROGRAM": "qlora_tui.training",
            "DRILL_AT": str(luck.randint(1, _WRITES)),
            "DRILL_COUNT": str(count),
            "DRILL_ERRNO": str(luck.choice(CODES)),
        },
    ) as run:
        state = runs.wait_until_over(run)
        for event in EventTail(run.events_path).drain():
            if isinstance(event, Failed) and event.kind == "bug":
                raise Failure(f"the disk's failure was not recognized: {event.title}: {event.what}")
        if count == 1 and state == "failed":
            raise Failure("one failed write ended the run")
        runs.resume_to_the_end(run)
        runs.check_finished(run)


@lru_cache
def library() -> Path:
    """The preloaded library, compiled once."""
    path = Path(tempfile.gettempdir()) / "qlora-tui-drill-faulty-disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("The rows about failing disks need a C compiler named cc.")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl"], check=True)
    return path
