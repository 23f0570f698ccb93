"""The same rows trained by several trainers in turns on a GPU, within a deadline.

    python -m bench.gpu_baselines [--size 8b] [--models FOLDER] [--row-tokens 2048] [--samples 48]
        [--ways qlora_tui_run unsloth_trainer hf_trainer trl_trainer] [--checkpointing on off]
        [--data ALPACA.json] [--seconds 540] [--out FILE.json]

Without --data, every sample fills a row, so that packing does not matter; compare with Unsloth in this way.
With --data, about eight samples fill a row. The order is reversed every turn. A trainer is not started if its
last run took longer than the time left. At the deadline, all processes are ended. The file is written after
each run.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bench.baselines.job import TrainingJob
from bench.baselines.runner import measure
from bench.gpu_acceptance import write_report
from bench.support.child_processes import adopt_orphans, end_descendants, end_descendants_on_sigterm
from bench.support.random_model import SIZES, make_rows, random_model
from bench.training import write_rows
from qlora_tui.gpu.visible_devices import set_device_variables

WAYS = ("qlora_tui_run", "unsloth_trainer", "hf_trainer", "trl_trainer")
_FIRST_RUN_S = 60.0
"""Seconds that a run is expected to take before another one of its kind was measured."""
_LOG_CHARACTERS = 1500
_PACKED_SAMPLES = 8
"""Number of conversations per row, if several share one."""


def main() -> int:
    """Measure in turns; return 1 if no run of a trainer was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="8b")
    parser.add_argument("--models", type=Path, help="folder of the random models, for a later call too")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=48, help="rows")
    parser.add_argument("--data", type=Path, help="a JSON list of instruction, input, output")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--checkpointing", nargs="*", choices=("on", "off"), default=["on"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=Path("gpu_baselines.json"))
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    # These apply to all processes, including other trainers. Set them before the user's settings are
    # unreachable.
    set_device_variables()
    adopt_orphans()
    end_descendants_on_sigterm()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        models = (args.models or scratch / "models").absolute()
        models.mkdir(parents=True, exist_ok=True)
        job = TrainingJob(
            model=str(random_model(models / args.size, args.size)),
            rows=str(write_rows(conversations(args, scratch), scratch / "rows.jsonl")),
            out="",
            dtype=args.dtype,
            row_tokens=args.row_tokens,
            # One sample is a row, or several fill one.
            samples_per_step=_PACKED_SAMPLES if args.data else 1,
        )
        variants = [(way, checkpointing) for way in args.ways for checkpointing in args.checkpointing]
        runs = take_turns(job, variants, args.turns, until, args.out)
    print(table(runs))
    return int(not all(any("tokens_per_s" in run for run in each) for each in runs.values()))


def conversations(args: argparse.Namespace, scratch: Path) -> list[dict[str, str]]:
    """Return Alpaca rows: from the given file, or samples that are each longer than a row."""
    if args.data:
        given: list[dict[str, str]] = json.loads(args.data.read_text())
        return given[: args.samples * _PACKED_SAMPLES]
    file = make_rows(scratch / "long.json", args.samples, long_words=2 * args.row_tokens)
    rows: list[dict[str, str]] = json.loads(file.read_text())
    return rows


def take_turns(
    job: TrainingJob, variants: list[tuple[str, str]], turns: int, until: float, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each trainer and setting, which are written to ``out`` after each run."""
    runs: dict[str, list[dict[str, Any]]] = {name_of(*variant): [] for variant in variants}
    took_s = dict.fromkeys(runs, _FIRST_RUN_S)
    for turn in range(turns):
        for way, checkpointing in variants if turn % 2 == 0 else reversed(variants):
            name = name_of(way, checkpointing)
            if time.monotonic() + took_s[name] > until:
                continue
            began = time.monotonic()
            this_job = replace(job, checkpointing=checkpointing == "on", seed=turn + 1)
            runs[name].append(run_once(this_job, way, f"{turn}-{way}-{checkpointing}", until))
            took_s[name] = time.monotonic() - began
            write_report(runs, out)
            print(f"{name}: {json.dumps(runs[name][-1])[:300]}  ({took_s[name]:.0f} s)", flush=True)
    return runs


def name_of(way: str, checkpointing: str) -> str:
    """Return the name of a trainer with its setting, for the report."""
    return f"{way}, checkpointing {checkpointing}"


def run_once(job: TrainingJob, way: str, name: str, until: float) -> dict[str, Any]:
    """Train once; report a failure or the deadline in the result. Processes of the trainer are ended."""
    scratch = Path(job.rows).parent
    try:
        with deadline(until):
            result = measure(sys.executable, way, replace(job, out=str(scratch / name)), scratch)
    except (SystemExit, TimeoutError) as reason:
        log = scratch / f"{name}.log"
        end = log.read_text(errors="replace")[-_LOG_CHARACTERS:] if log.exists() else ""
        return {"failed": str(reason), "log": end}
    finally:
        end_descendants()
    return {
        "tokens_per_s": round(result.tokens_per_s, 1),
        "peak_gib": round(result.peak_bytes / 2**30, 3),
        "estimated_gib": round(result.estimated_bytes / 2**30, 3),
        "steps": len(result.losses),
        "tokens": result.tokens,
        "loss": result.losses[-1],
    }


@contextmanager
def deadline(until: float) -> Iterator[None]:
    """Raise TimeoutError if the block has not ended at this value of ``time.monotonic``."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the deadline passed")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, until - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the medians as text."""
    lines = []
    for name, each in runs.items():
        measured = [run for run in each if "tokens_per_s" in run]
        if not measured:
            lines.append(f"{name:<34} not measured")
            continue
        speed = statistics.median(run["tokens_per_s"] for run in measured)
        peak = max(run["peak_gib"] for run in measured)
        lines.append(f"{name:<34} {speed:10,.0f} tokens/s {peak:8.2f} GiB  {len(measured)} runs")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
