"""Speed, memory and loss of training: the usual script and TRL's packing beside this program.

    python -m bench.training --model FOLDER --data ALPACA.json [--repeats 3] [--json]

The same conversations, model, targets, rank, dtype and effective batch for (a) ``Trainer`` as most
scripts use it, (b) TRL's ``SFTTrainer`` with packing, in the environment that ``make bench-deps`` makes, and
(c) a run of this program. Each trains in a separate process, in turns whose order is reversed every time;
medians count. Real tokens a second are taken from the end of the first step to the end of the last; memory is
what training adds to the loaded model. Every adapter is judged by plain peft on the same held-out
conversations.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.baselines.job import TrainingJob
from bench.baselines.runner import Measurement, lines_of, measure
from bench.support.turns import in_turn

WAYS = {"a": "hf_trainer", "b": "trl_packed", "c": "qlora_tui_run"}
TRL_PYTHON = Path(__file__).parents[1] / ".bench-venv" / "bin" / "python"
SETTINGS = {
    "dropout 0": {"dropout": 0.0},
    "dropout 0.05": {"dropout": 0.05},
    "dropout 0.05, checkpointing": {"dropout": 0.05, "checkpointing": True},
}


def main() -> int:
    """Measure every setting; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser, samples=36, validation=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not TRL_PYTHON.exists():
        sys.exit("`make bench-deps` first: it makes the environment that TRL runs in.")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        job = shared_job(args, scratch)
        report: dict[str, Any] = {"dtype": job.dtype, "limit": limit(job, scratch), "settings": {}}
        for name in args.settings:
            say(name)
            report["settings"][name] = one_setting(replace(job, **SETTINGS[name]), args.repeats, scratch)
    print(json.dumps(report) if args.json else table(report))
    return 0


def add_data_arguments(parser: argparse.ArgumentParser, *, samples: int, validation: int) -> None:
    """What :func:`shared_job` reads."""
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--data", required=True, help="a JSON list of instruction, input, output")
    parser.add_argument("--samples", type=int, default=samples, help="conversations to train on")
    parser.add_argument("--validation", type=int, default=validation, help="conversations held out")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; what the device is quickest at")


def shared_job(args: argparse.Namespace, scratch: Path) -> TrainingJob:
    """Conversations drawn once, and what every way is read_job."""
    rows = json.loads(Path(args.data).read_text())
    random.Random(0).shuffle(rows)
    train = write_rows(rows[: args.samples], scratch / "train.jsonl")
    held_out = write_rows(rows[args.samples : args.samples + args.validation], scratch / "validation.jsonl")
    return TrainingJob(
        model=str(Path(args.model).resolve()),
        rows=str(train),
        validation=str(held_out),
        out="",
        dtype=args.dtype or quickest_dtype(),
    )


def write_rows(rows: list[dict[str, str]], path: Path) -> Path:
    """Alpaca rows as conversations."""
    with path.open("w") as lines:
        for row in rows:
            question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def quickest_dtype() -> str:
    """As this program chooses it."""
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.compute_device import find_device

    return find_device(Recipe()).dtype_name


def limit(job: TrainingJob, scratch: Path) -> float:
    """Tokens a second if matrix products were all."""
    file = job.write(scratch / "limit.json")
    (line,) = lines_of(sys.executable, "bench.baselines.matmul_limit", [str(file)], scratch / "limit.log")
    return float(line["tokens_per_s"])


def one_setting(job: TrainingJob, repeats: int, scratch: Path) -> dict[str, Any]:
    """Run all trainers in alternating order; each repeat has its own seed."""
    runs: dict[str, list[Measurement]] = {key: [] for key in WAYS}
    judged: dict[str, list[float]] = {key: [] for key in WAYS}
    for repeat in range(repeats):
        folders = {}
        for key in in_turn(WAYS, repeat):
            out = scratch / f"{len(list(scratch.iterdir()))}-{key}"
            python = str(TRL_PYTHON) if key == "b" else sys.executable
            result = measure(python, WAYS[key], replace(job, out=str(out), seed=repeat + 1), scratch)
            runs[key].append(result)
            folders[str(out)] = key
            say(f"  {key} {result.tokens_per_s:6.1f} tokens/s  +{result.growth_bytes / 2**20:,.0f} MiB")
        file = job.write(scratch / "judge.json")
        for line in lines_of(
            sys.executable, "bench.baselines.evaluate_adapters", [str(file), *folders], scratch / "judge.log"
        ):
            if line["adapter"] in folders:
                judged[folders[line["adapter"]]].append(line["loss"])
            else:
                base = line["loss"]
    return {"base_validation_loss": base} | {
        key: {
            "tokens": runs[key][0].tokens,
            "steps": len(runs[key][0].losses),
            "tokens_per_s": statistics.median(run.tokens_per_s for run in runs[key]),
            "trained_per_s": statistics.median(run.trained_per_s for run in runs[key]),
            "growth_bytes": statistics.median(run.growth_bytes for run in runs[key]),
            "final_loss": statistics.median(run.losses[-1] for run in runs[key]),
            "validation_loss": statistics.mean(judged[key]),
            "runs": [asdict(run) for run in runs[key]],
            "judged": judged[key],
        }
        for key in WAYS
    }


def table(report: dict[str, Any]) -> str:
    """Format the results as a table."""
    lines = [f"matrix products alone: {report['limit']:.0f} tokens/s in {report['dtype']}"]
    for name, setting in report["settings"].items():
        lines += ["", f"{name} (base: validation loss {setting['base_validation_loss']:.4f})"]
        ours = setting["c"]
        for key, way in WAYS.items():
            result = setting[key]
            beside = (
                f"  of the limit {result['tokens_per_s'] / report['limit']:.2f}"
                if key == "c"
                else f"  ours {ours['tokens_per_s'] / result['tokens_per_s']:.2f}× as fast,"
                f" {ours['growth_bytes'] / result['growth_bytes']:.2f}× the memory,"
                f" validation loss {ours['validation_loss'] / result['validation_loss'] - 1:+.2%}"
            )
            lines.append(
                f"  ({key}) {way:<10} {result['tokens_per_s']:6.1f} tokens/s"
                f" ({result['trained_per_s']:.1f} trained)"
                f"  +{result['growth_bytes'] / 2**20:5,.0f} MiB"
                f"  {result['steps']} steps, {result['tokens']} tokens"
                f"  loss {result['final_loss']:.3f}, validation {result['validation_loss']:.4f}{beside}"
            )
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
