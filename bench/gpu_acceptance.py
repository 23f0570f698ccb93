"""Everything that only a GPU can prove, in one go: for a checkout on a box with CUDA, without a hub.

    python -m bench.gpu_acceptance [--size 0.5b|1.5b|8b] [--out FILE.json]
    python -m bench.gpu_acceptance --size tiny --only loop resume grid     (a dry run, on a CPU)

A Llama of that size with random weights is made on the spot. Each check prints one line and leaves its
figures in the JSON file, beside GPU, driver and versions: the loop from recipe to an adapter that plain peft
loads; exact resuming; the estimate against what torch counted, over a grid; a real lack of memory and the
retry; NVML while it trains; the usual script and TRL beside ours (with ``make bench-deps``). Exit code 1
where one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.acceptance_checks import CHECKS, GRID, Box, Outcome, Skip
from bench.acceptance_model import SIZES, make_model, make_rows
from qlora_tui.gpu.driver import open_driver
from qlora_tui.gpu.errors import GpuUnavailableError


def main() -> int:
    """Make the model, run the checks, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.5b")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.json"))
    args = parser.parse_args()
    report: dict[str, Any] = {"size": args.size, "checks": {}}
    # A runner may still write its last line when the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = str(scratch / kind.lower())
        box = make_box(scratch, args.size)
        for name in args.only:
            began = time.monotonic()
            outcome = checked(CHECKS[name], box)
            mark, seconds = "ok" if outcome.ok else "FAILED", time.monotonic() - began
            print(f"{mark:<7} {name:<8} {outcome.says}  ({seconds:.0f} s)", flush=True)
            report["checks"][name] = asdict(outcome)
        report["box"] = described(box)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(check["ok"] for check in report["checks"].values()) else 1


def checked(check: Callable[[Box], Outcome], box: Box) -> Outcome:
    """Run one; whatever it raises is a failure of that check alone."""
    try:
        return check(box)
    except Skip as why:
        return Outcome(True, f"skipped: {why}", {"skipped": str(why)})
    except Exception as error:  # the others go on
        return Outcome(False, f"{type(error).__name__}: {error}")


def make_box(scratch: Path, size: str) -> Box:
    """Model and data."""
    import torch

    longest = max(length for _, length, _ in GRID)
    return Box(
        model=make_model(scratch / "model", size),
        rows=make_rows(scratch / "rows.json", 64),
        long_rows=make_rows(scratch / "long.json", 16, long_words=longest),
        scratch=scratch,
        size=size,
        has_gpu=torch.cuda.is_available(),
    )


def described(box: Box) -> dict[str, Any]:
    """GPU, driver and versions."""
    import platform
    from importlib.metadata import version

    import torch

    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    facts: dict[str, Any] = {"python": platform.python_version()}
    facts |= {package: version(package) for package in packages}
    if box.has_gpu:
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "cuda": torch.version.cuda}
        with suppress(GpuUnavailableError), open_driver() as driver:
            facts["driver"] = driver.list_gpus()[0].driver
    return facts


if __name__ == "__main__":
    sys.exit(main())
