"""What the forgetting curve shows and costs: a real model overtrained on the demo's voice, and with replay.

    python -m bench.forgetting [--steps 60] [--prompts 12] [--shares 0,0.1,0.25] [--json]

Trains the demo's model on the demo's conversations once without the curve, once with it, and once with each
share of replay, each run in a process as the runner starts it. State goes to a temporary folder; the model of
``qlora-tui demo`` is read from the cache. Reports the curve, the counts over general answers, the validation
loss, the peak of the process, its CPU time, and how much of it the curve took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import msgspec

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.demo.demo_run import PRESET
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.view import RunView


def main() -> int:
    """Train each variant; print a line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--shares", default="0,0.1,0.25", help="shares of replay, by commas")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = str(ensure_model(lambda sentence: print(sentence, file=sys.stderr)))
    variants: list[tuple[int, float]] = [(0, 0.0)]
    variants += [(args.prompts, float(share)) for share in args.shares.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state
        for prompts, share in variants:
            results.append(train(model, args.steps, prompts, share))
            print(json.dumps(results[-1]) if args.json else line(results[-1]), flush=True)
    return 0


def train(model: str, steps: int, prompts: int, share: float) -> dict[str, Any]:
    """One run, as its events and the system report it."""
    sets = [
        f"name=forgetting-{prompts}-{share:g}",
        "model.chat_template=chatml",
        "training.epochs=40",
        f"training.max_steps={steps}",
        f"training.eval_every={max(1, steps // 3)}",
        f"training.general_prompts={prompts}",
        f"training.replay_share={share}",
    ]
    run = create_run(build_recipe(preset=PRESET, sets=sets, model=model, data=[str(CONVERSATIONS)]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    with run.log_path.open("wb") as log:
        subprocess.run([sys.executable, "-m", "qlora_tui.training", run.path], check=True, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    view = RunView(run)
    view.refresh()
    assert view.memory is not None
    return {
        "prompts": prompts,
        "replay_share": share,
        "steps": view.step,
        "curve": {e.step: e.forgetting for e in view.evaluations},
        "validation_loss": {e.step: e.loss for e in view.evaluations},
        "general_answers": msgspec.to_builtins(view.general_answers),
        "estimated_bytes": view.memory.estimated_bytes,
        "peak_bytes": view.memory.measured_bytes,
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def line(result: dict[str, Any]) -> str:
    """One variant in a line."""
    curve = " ".join("NA" if value is None else f"{value:.2f}" for value in result["curve"].values())
    loss = list(result["validation_loss"].values())[-1]
    return (
        f"prompts {result['prompts']:>2}  replay {result['replay_share']:<5g} curve {curve}  "
        f"validation loss {loss:.3f}  peak {result['peak_bytes'] / 1e9:.2f} GB  "
        f"CPU {result['cpu_s']:.0f} s  {result['general_answers'] or ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
