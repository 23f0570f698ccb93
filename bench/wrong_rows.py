"""Whether `qlora-tui data blame` finds wrong rows: swapped answers in a real data set, and a real model.

    python -m bench.wrong_rows --data ALPACA.json [--rows 500] [--wrong 20] [--length 96] [--seed 1] [--json]

Takes the first rows without an extra input, swaps the answers of some in a circle, trains the demo's model
on them for an epoch, and counts how many of the swapped rows are among the first of the ranking. State goes
to a temporary folder; the model of ``qlora-tui demo`` is read from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.demo.demo_run import PRESET
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.row_losses import RowLosses, read_row_losses


def main() -> int:
    """Plant, train, rank; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--wrong", type=int, default=20)
    parser.add_argument("--first", type=int, default=30)
    parser.add_argument("--length", type=int, default=96, help="tokens of a row; longer answers are cut")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the run's files")
    args = parser.parse_args()
    model = str(ensure_model(lambda sentence: print(sentence, file=sys.stderr)))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = str(args.keep or scratch)
        file = Path(scratch) / "rows.jsonl"
        wrong = plant(args.data, file, args.rows, args.wrong, args.seed)
        sets = [
            "name=wrong-rows",
            "model.chat_template=chatml",
            "training.epochs=1",
            "training.general_prompts=0",
            "data.validation_fraction=0",
            f"data.max_length={args.length}",
        ]
        run = create_run(build_recipe(preset=PRESET, sets=sets, model=model, data=[str(file)]))
        started = time.monotonic()
        for module in ("qlora_tui.training", "qlora_tui.training.row_loss_worker"):
            subprocess.run([sys.executable, "-m", module, run.path], check=True, stdout=subprocess.DEVNULL)
        losses = read_row_losses(run)
    assert losses is not None
    result = {
        "rows": len(losses.rows),
        "wrong": len(wrong),
        "first": args.first,
        "wrong_among_first": wrong_among(losses, wrong, args.first),
        "ranks": [n for n, row in enumerate(losses.rows, 1) if row.row in wrong],
        "classes": losses.counts(),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0


def plant(data: Path, file: Path, count: int, wrong: int, seed: int) -> set[int]:
    """Write ``count`` rows, the answers of ``wrong`` of them swapped; the numbers of these."""
    rows = [row for row in json.loads(data.read_text()) if not row.get("input")][:count]
    chosen = random.Random(seed).sample(range(len(rows)), wrong)
    answers = [rows[i]["output"] for i in chosen]
    for i, answer in zip(chosen, answers[1:] + answers[:1], strict=True):
        rows[i] = {**rows[i], "output": answer}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {i + 1 for i in chosen}


def wrong_among(losses: RowLosses, wrong: set[int], first: int) -> int:
    """Number of wrong rows among the first of the ranking."""
    return sum(row.row in wrong for row in losses.rows[:first])


if __name__ == "__main__":
    sys.exit(main())
