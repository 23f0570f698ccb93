"""Whether the suggestion of `qlora-tui lr-find` is a good rate: short runs at it, a tenth and ten times it.

    python -m bench.learning_rates --data ALPACA.json [--steps 40] [--set KEY=VALUE] [--json]

Measures the range test of the demo's model and preset on the data, or reads the stored one, then trains three
runs that differ in the rate alone, and prints their validation loss. State goes to a temporary folder; the
model of ``qlora-tui demo`` is read from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.demo.demo_run import PRESET
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.lr_range import RangeSettings
from qlora_tui.runs.lr_range_job import measure_lr_range, read_stored
from qlora_tui.runs.lr_suggestion import read_curve
from qlora_tui.runs.view import RunView


def main() -> int:
    """Measure, train, compare; 1 where the suggestion is the worst of the three rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = str(ensure_model(lambda sentence: print(sentence, file=sys.stderr)))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = scratch
        sets = ["model.chat_template=chatml", *args.sets]
        recipe = build_recipe(preset=PRESET, sets=sets, model=model, data=[str(args.data.absolute())])
        lr_range = read_stored(recipe) or measure_lr_range(recipe, RangeSettings())
        curve = read_curve(lr_range)
        print(curve.sentence, file=sys.stderr)
        if curve.suggested is None:
            return 1
        rates = [curve.suggested / 10, curve.suggested, curve.suggested * 10]
        losses = [validation_loss(recipe, rate, args.steps) for rate in rates]
    result = {
        "suggested": curve.suggested,
        "range_steps": len(lr_range.steps),
        "range_seconds": round(lr_range.seconds),
        "steps": args.steps,
        "rates": rates,
        "validation_losses": [round(loss, 4) for loss in losses],
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return int(losses[1] == max(losses))


def validation_loss(recipe: Recipe, rate: float, steps: int) -> float:
    """Validation loss after a run of ``steps`` steps with this peak rate."""
    for path, value in (("training.learning_rate", rate), ("training.max_steps", steps)):
        recipe = replace_setting(recipe, path, value)
    run = create_run(recipe)
    argv = [sys.executable, "-m", "qlora_tui.training", run.path]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    view = RunView(run)
    view.refresh()
    loss = view.evaluations[-1].loss
    print(f"{rate:g}: {view.loss_before_training} → {loss}", file=sys.stderr)
    return float("nan") if loss is None else loss


if __name__ == "__main__":
    sys.exit(main())
