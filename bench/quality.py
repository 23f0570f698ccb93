"""What quantization costs in quality: NF4, double quantization and FP4 against 16-bit LoRA, all trained here.

    python -m bench.quality --model FOLDER --data ALPACA.json [--seeds 3] [--json]

The same rows, order, steps and adapter; only how the frozen base is held differs. Runs are evaluated by
themselves, before and after, on conversations they never trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.baselines.runner import Measurement, measure
from bench.training import add_data_arguments, say, shared_job

BASES: dict[str, dict[str, Any]] = {
    "16-bit": {"method": "none"},
    "NF4": {"method": "nf4", "double": False},
    "NF4, double quantization": {"method": "nf4", "double": True},
    "FP4": {"method": "fp4", "double": False},
}


def main() -> int:
    """Train each base with each seed; print the table of the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser, samples=48, validation=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs: dict[str, list[Measurement]] = {name: [] for name in BASES}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job = replace(shared_job(args, scratch), dropout=0.05)
        for seed in range(1, args.seeds + 1):
            for number, (name, base) in enumerate(BASES.items()):
                out = str(scratch / f"{seed}-{number}")
                result = measure(
                    sys.executable, "qlora_tui_run", replace(job, **base, out=out, seed=seed), scratch
                )
                runs[name].append(result)
                say(f"  seed {seed}  {name:<26} {last(result):.4f}")
    report = {"dtype": job.dtype, "tokens": runs["16-bit"][0].tokens, "bases": summary(runs)}
    print(json.dumps(report) if args.json else table(report))
    return 0


def last(run: Measurement) -> float:
    """Validation loss after training."""
    return run.evaluated[max(run.evaluated)]


def summary(runs: dict[str, list[Measurement]]) -> dict[str, dict[str, Any]]:
    """Validation losses of each base, and how far they are from those of 16 bits, seed by seed."""
    summaries = {}
    for name, each in runs.items():
        after = [last(run) for run in each]
        worse = [loss / last(same) - 1 for loss, same in zip(after, runs["16-bit"], strict=True)]
        summaries[name] = {
            "before": each[0].evaluated[0],
            "after": after,
            "mean_after": statistics.mean(after),
            "mean_worse_than_16_bit": statistics.mean(worse),
        }
    return summaries


def table(report: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| base | before | after | vs. 16-bit |", "| --- | ---: | ---: | ---: |"]
    for name, losses in report["bases"].items():
        worse = "" if name == "16-bit" else f"{losses['mean_worse_than_16_bit']:+.2%}"
        lines.append(f"| {name} | {losses['before']:.4f} | {losses['mean_after']:.4f} | {worse} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
