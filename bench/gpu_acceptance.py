"""All checks that require a GPU: for a checkout on a machine with CUDA, without the Hub.

    python -m bench.gpu_acceptance --first                      (the first five minutes on a GPU)
    python -m bench.gpu_acceptance [--size 0.5b|1.5b|8b] [--model FOLDER] [--only CHECK…] [--out FILE.json]
    python -m bench.gpu_acceptance --size tiny                  (a dry run, on a CPU)

Creates a Llama of the given size with random weights, in FOLDER if given, where a later call finds it. Each
check runs in a separate process, within its own deadline and within --seconds for all checks. After each
check, all its processes are ended, including those of its runs, and the JSON file is written. The exit code
is 1 if a check failed or met its deadline.

* machine, doctor
* parts: context (GPU memory of a process), four_bit, triton_kernels, varlen_attention, out_of_memory (whether
  it is recognized), step (speed and peak of a micro-batch)
* runs: loop (from recipe to an adapter that plain peft loads), nvml (telemetry), float16, sigterm (to a
  trainer), resume and resume_8bit (exact), memory (a real lack of memory and the retries), streaming and
  offload (losses and memory with layers, or their inputs, in host memory)
* chat (speed compared with plain generate, by a CUDA graph), grid (the estimate against torch's count)

If calls are limited to ten minutes: for 0.5b, run all checks except grid, then grid; for 8b, run ``machine
doctor loop nvml float16``, then ``resume memory``, then ``grid``, each with the same --model.
:mod:`bench.gpu_baselines` compares speed and memory with other trainers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.acceptance.check import CHECKS, FIRST, deadline_s
from bench.acceptance.context import CheckContext, Outcome
from bench.acceptance.memory_checks import LONGEST
from bench.support.child_processes import (
    adopt_orphans,
    end_descendants_on_sigterm,
    python_module,
    run_within,
)
from bench.support.random_model import SIZES, make_rows, random_model
from qlora_tui.gpu.visible_devices import set_device_variables

_MIN_S = 2.0
"""Seconds that must be left to start a check."""


def main() -> int:
    """Create the model, run the checks and write the report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="0.5b")
    parser.add_argument("--model", type=Path, help="folder of the model; made there if it is missing")
    parser.add_argument("--first", action="store_true", help="the checks of the first five minutes")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS))
    parser.add_argument("--seconds", type=float, default=570.0, help="for all checks; default: 570")
    parser.add_argument("--out", type=Path, default=Path("gpu_acceptance.json"))
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    # These apply to all processes, including other trainers. Set them before the user's settings are
    # unreachable.
    set_device_variables()
    adopt_orphans()
    end_descendants_on_sigterm()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = str(scratch / kind.lower())
        context = CheckContext(
            model=str(random_model((args.model or scratch / "model").absolute(), args.size)),
            rows=str(make_rows(scratch / "rows.json", 64)),
            long_rows=str(make_rows(scratch / "long.json", 16, long_words=LONGEST)),
            scratch=folder,
            size=args.size,
            has_gpu=False,
        )
        report: dict[str, Any] = {"size": args.size, "checks": {}}
        names = args.only or (FIRST if args.first else CHECKS)
        # The outcome of the machine check determines what the other checks do.
        for name in dict.fromkeys(("machine", *names)):
            began = time.monotonic()
            outcome = make_check(name, context, until, scratch)
            seconds = time.monotonic() - began
            if name == "machine":
                context = replace(context, has_gpu=outcome.figures.get("has_gpu", False))
            print(f"{outcome.result:<11} {name:<16} {outcome.summary}  ({seconds:.0f} s)", flush=True)
            report["checks"][name] = asdict(outcome) | {"seconds": round(seconds, 1)}
            write_report(report, args.out)
    return 0 if all(check["result"] in ("ok", "skipped") for check in report["checks"].values()) else 1


def make_check(name: str, context: CheckContext, until: float, scratch: Path) -> Outcome:
    """Run one check within its deadline. ``until`` is the time at which all checks end."""
    now = time.monotonic()
    seconds = min(deadline_s(name, context.size), until - now)
    if seconds < _MIN_S:
        return Outcome("out of time", "not started")
    file = replace(context, deadline=now + seconds).write(scratch / f"{name}.context.json")
    outcome_file, log = scratch / f"{name}.json", scratch / f"{name}.log"
    code = run_within(seconds, python_module("bench.acceptance.check", name, file, outcome_file), log=log)
    if outcome_file.exists():
        return Outcome(**json.loads(outcome_file.read_text()))
    log_end = log.read_text(errors="replace")[-1000:]
    if code is None:
        return Outcome("out of time", f"killed after {seconds:.0f} s", {"log": log_end})
    return Outcome("failed", f"ended with exit code {code}", {"log": log_end})


def write_report(report: dict[str, Any], path: Path) -> None:
    """Replace the report, so that a reader never sees an incomplete one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(report, indent=1, default=str) + "\n")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
