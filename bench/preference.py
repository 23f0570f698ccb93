"""Training on pairs of answers: TRL's trainers beside this program, their speed and memory.

    python -m bench.preference --model FOLDER --data ALPACA.json [--repeats 3] [--methods orpo dpo] [--json]

Pairs are made of Alpaca rows: the row's answer is chosen, that of another row rejected, both cut to
``--words``. The same pairs, model in NF4, targets, rank and dtype for (a) TRL with as many pairs to a batch
as (b) this program packs into a sequence on average. Each trains in a separate process, in turns whose order
is reversed every time; medians count. Real tokens a second, without padding and the reference's, are taken
from the end of the first step to the end of the last; memory is what training adds to the loaded model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.baselines.job import TrainingJob
from bench.baselines.runner import Measurement, measure
from bench.support.turns import in_turn
from bench.training import quickest_dtype, say

WAYS = {"a": "trl_preference", "b": "qlora_tui_run"}


def main() -> int:
    """Measure each method; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--data", required=True, help="a JSON list of instruction, input, output")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--words", type=int, default=60, help="words of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["orpo", "dpo"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows = write_pairs(args, scratch / "pairs.jsonl")
        job = TrainingJob(
            model=str(Path(args.model).resolve()),
            rows=str(rows),
            out="",
            dtype=quickest_dtype(),
            row_tokens=512,
        )
        for method in args.methods:
            report[method] = one_method(replace(job, preferences=method), args.repeats, scratch)
            say(line(method, report[method]))
    print(json.dumps(report) if args.json else "\n".join(line(*item) for item in report.items()))
    return 0


def write_pairs(args: argparse.Namespace, path: Path) -> Path:
    """Write pairs that all have a prompt of at most 60 words."""
    rows = json.loads(Path(args.data).read_text())
    random.Random(0).shuffle(rows)
    questions = [(f"{row['instruction']}\n\n{row['input']}".strip(), row["output"]) for row in rows]
    questions = [
        (prompt, cut(answer, args.words)) for prompt, answer in questions if len(prompt.split()) <= 60
    ]
    with path.open("w") as lines:
        for (prompt, chosen), (_, rejected) in pairwise(questions[: args.pairs + 1]):
            lines.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def cut(text: str, words: int) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:words])


def one_method(job: TrainingJob, repeats: int, scratch: Path) -> dict[str, Any]:
    """Run both ways in alternating order; each repeat has its own seed."""
    runs: dict[str, list[Measurement]] = {key: [] for key in WAYS}
    for repeat in range(repeats):
        for key in in_turn(WAYS, repeat):
            out = scratch / f"{len(list(scratch.iterdir()))}-{key}"
            result = measure(sys.executable, WAYS[key], replace(job, out=str(out), seed=repeat + 1), scratch)
            runs[key].append(result)
            say(
                f"  {key} {result.tokens_per_s:6.1f} tokens/s  {result.tokens_per_cpu_s:6.1f} tokens/CPU s"
                f"  +{result.growth_bytes / 2**20:,.0f} MiB"
            )
    return {
        key: {
            "tokens": runs[key][0].tokens,
            "steps": len(runs[key][0].losses),
            "first_loss": statistics.median(run.losses[0] for run in runs[key]),
            "tokens_per_s": statistics.median(run.tokens_per_s for run in runs[key]),
            "tokens_per_cpu_s": statistics.median(run.tokens_per_cpu_s for run in runs[key]),
            "growth_bytes": statistics.median(run.growth_bytes for run in runs[key]),
            "runs": [asdict(run) for run in runs[key]],
        }
        for key in WAYS
    }


def line(method: str, result: dict[str, Any]) -> str:
    """Both ways in a line."""
    theirs, ours = result["a"], result["b"]
    ways = "  ".join(
        f"{name} {way['tokens_per_s']:.1f} tokens/s, {way['tokens_per_cpu_s']:.1f} per CPU s"
        f" +{way['growth_bytes'] / 2**20:,.0f} MiB"
        f" ({way['steps']} steps, {way['tokens']} tokens)"
        for name, way in (("TRL", theirs), ("ours", ours))
    )
    return (
        f"{method}: {ways}: {ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}× as fast "
        f"({ours['tokens_per_cpu_s'] / theirs['tokens_per_cpu_s']:.2f}× by processor time), "
        f"{ours['growth_bytes'] / theirs['growth_bytes']:.2f}× the memory"
    )


if __name__ == "__main__":
    sys.exit(main())
