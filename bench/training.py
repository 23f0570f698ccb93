"""Speed, memory and loss of training: a typical script and TRL compared with this program.

    python -m bench.training --model FOLDER --data ALPACA.json [--repeats 3] [--settings …] [--json]

Trains the same rows with the same NF4 model, targets, rank, dtype and effective batch with (a) ``Trainer`` as
in typical scripts, (b) TRL, in the environment that ``make bench-deps`` creates, and (c) a run of this
program. The rows are conversations, which TRL's ``SFTTrainer`` packs, or for ``orpo`` and ``dpo`` pairs of
answers, which only TRL trains too. Each trainer runs in a separate process, in turns whose order is reversed
every time; medians are reported. Tokens per second (without padding) are measured from the end of the first
step to the end of the last. Memory is the amount that training adds to the loaded model. Plain peft evaluates
adapters of conversations on the same held-out conversations.
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
from bench.baselines.runner import Measurement, in_turn, lines_of, measure

WAYS = {"a": "hf_trainer", "b": "trl_trainer", "c": "qlora_tui_run"}
TRL_PYTHON = Path(__file__).parents[1] / ".bench-venv" / "bin" / "python"
SETTINGS: dict[str, dict[str, Any]] = {
    "dropout 0": {"dropout": 0.0},
    "dropout 0.05": {"dropout": 0.05},
    "dropout 0.05, checkpointing": {"dropout": 0.05, "checkpointing": True},
    "orpo": {"preferences": "orpo", "row_tokens": 512},
    "dpo": {"preferences": "dpo", "row_tokens": 512},
}
_WORDS = 60
"""Maximum number of words of a prompt and of an answer in a pair."""


def main() -> int:
    """Measure every setting; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--data", required=True, help="a JSON list of instruction, input, output")
    parser.add_argument("--samples", type=int, default=36, help="conversations or pairs to train on")
    parser.add_argument("--validation", type=int, default=32, help="conversations held out")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; what the device is quickest at")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not TRL_PYTHON.exists():
        sys.exit("`make bench-deps` first: it makes the environment that TRL runs in.")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job = shared_job(args, scratch)
        pairs = write_pairs(args, scratch / "pairs.jsonl")
        report: dict[str, Any] = {"dtype": job.dtype, "settings": {}}
        for name in args.settings:
            say(name)
            this_job = replace(job, **SETTINGS[name])
            if this_job.preferences:
                this_job = replace(this_job, rows=str(pairs), validation="")
            report["settings"][name] = one_setting(this_job, args.repeats, scratch)
    print(json.dumps(report) if args.json else table(report))
    return 0


def shared_job(args: argparse.Namespace, scratch: Path) -> TrainingJob:
    """Return the job of all trainers, on conversations that are drawn once."""
    rows = shuffled_rows(args)
    train = write_rows(rows[: args.samples], scratch / "train.jsonl")
    held_out = write_rows(rows[args.samples : args.samples + args.validation], scratch / "validation.jsonl")
    return TrainingJob(
        model=str(Path(args.model).resolve()),
        rows=str(train),
        validation=str(held_out),
        out="",
        dtype=args.dtype or quickest_dtype(),
    )


def shuffled_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of ``--data`` in an order that is the same each time."""
    rows: list[dict[str, str]] = json.loads(Path(args.data).read_text())
    random.Random(0).shuffle(rows)
    return rows


def question_of(row: dict[str, str]) -> str:
    """Return instruction and input."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    """Write Alpaca rows as conversations."""
    with path.open("w") as lines:
        for row in rows:
            turns = [
                {"role": "user", "content": question_of(row)},
                {"role": "assistant", "content": row["output"]},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(args: argparse.Namespace, path: Path) -> Path:
    """Write pairs, in which a row's answer is chosen, and the next row's answer is rejected."""

    def cut(text: str) -> str:
        return " ".join(text.split()[:_WORDS])

    rows = [row for row in shuffled_rows(args) if len(question_of(row).split()) <= _WORDS]
    with path.open("w") as lines:
        for row, other in pairwise(rows[: args.samples + 1]):
            pair = {"chosen": cut(row["output"]), "rejected": cut(other["output"])}
            lines.write(json.dumps({"prompt": question_of(row)} | pair) + "\n")
    return path


def quickest_dtype() -> str:
    """Return the dtype that this program chooses."""
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.compute_device import find_device

    return find_device(Recipe()).dtype_name


def one_setting(job: TrainingJob, repeats: int, scratch: Path) -> dict[str, Any]:
    """Run all trainers in alternating order; each repeat has its own seed."""
    ways = {key: way for key, way in WAYS.items() if key != "a" or not job.preferences}
    runs: dict[str, list[Measurement]] = {key: [] for key in ways}
    judged: dict[str, list[float]] = {key: [] for key in ("base", *ways)}
    for repeat in range(repeats):
        folders = {}
        for key in in_turn(ways, repeat):
            out = scratch / f"{len(list(scratch.iterdir()))}-{key}"
            python = str(TRL_PYTHON) if key == "b" else sys.executable
            result = measure(python, ways[key], replace(job, out=str(out), seed=repeat + 1), scratch)
            runs[key].append(result)
            folders[str(out)] = key
            say(f"  {key} {result.tokens_per_s:6.1f} tokens/s  +{result.growth_bytes / 2**20:,.0f} MiB")
        if job.validation:
            file, log = job.write(scratch / "judge.json"), scratch / "judge.log"
            arguments = [str(file), *folders]
            for line in lines_of(sys.executable, "bench.baselines.evaluate_adapters", arguments, log):
                judged[folders.get(line["adapter"], "base")].append(line["loss"])
    result_of = {
        key: {
            "tokens": runs[key][0].tokens,
            "steps": len(runs[key][0].losses),
            "tokens_per_s": statistics.median(run.tokens_per_s for run in runs[key]),
            "tokens_per_cpu_s": statistics.median(run.tokens_per_cpu_s for run in runs[key]),
            "growth_bytes": statistics.median(run.growth_bytes for run in runs[key]),
            "final_loss": statistics.median(run.losses[-1] for run in runs[key]),
            "validation_loss": statistics.mean(judged[key]) if judged[key] else None,
            "runs": [asdict(run) for run in runs[key]],
        }
        for key in ways
    }
    return {"base_validation_loss": judged["base"][0] if judged["base"] else None} | result_of


def table(report: dict[str, Any]) -> str:
    """Format the results as a table."""
    lines = [f"in {report['dtype']}"]
    for name, setting in report["settings"].items():
        base, ours = setting["base_validation_loss"], setting["c"]
        lines += ["", name if base is None else f"{name} (base: validation loss {base:.4f})"]
        for key, way in WAYS.items():
            if (result := setting.get(key)) is None:
                continue
            line = (
                f"  ({key}) {way:<13} {result['tokens_per_s']:6.1f} tokens/s"
                f" ({result['tokens_per_cpu_s']:.1f} per CPU s)  +{result['growth_bytes'] / 2**20:5,.0f} MiB"
                f"  {result['steps']} steps, {result['tokens']} tokens, loss {result['final_loss']:.3f}"
            )
            if result["validation_loss"] is not None:
                line += f", validation {result['validation_loss']:.4f}"
            if key != "c":
                line += (
                    f"  ours {ours['tokens_per_s'] / result['tokens_per_s']:.2f}× as fast,"
                    f" {ours['growth_bytes'] / result['growth_bytes']:.2f}× the memory"
                )
            lines.append(line)
    return "\n".join(lines)


def say(line: str) -> None:
    """Print progress on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
