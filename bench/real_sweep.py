"""A sweep over the learning rate on the demo's model and data, halved once, with its verdict.

    python -m bench.real_sweep      (make real-sweep)

The base has a recipe's default rate. Prints the table of the sweep, and the CPU time of all its trainers. The
exit code is 1 if the winner is not better than the base by more than the noise between seeds.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from qlora_tui.cli import main as command
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.status import read_status
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.sheet import Sheet, Sweep
from qlora_tui.sweeps.view import SweepView, read_sweep

_STEPS = 16
_RATES = [1e-4, 5e-4, 2e-3, 6e-3]
_PERIOD_S = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Run the sweep to its end."""
    model = ensure_model(print, on_progress=lambda text: None)
    sets = [
        "model.chat_template=chatml",
        f"training.learning_rate={Training().learning_rate}",
        "training.lr_scheduler=wsd",
        f"training.max_steps={_STEPS}",
    ]
    recipe = build_recipe(preset="cpu-demo", sets=sets, model=str(model), data=[str(CONVERSATIONS)])
    vary = Sweep(name="demo", method="grid", rounds=2, seeds=2, vary={"training.learning_rate": list(_RATES)})
    sweep = actions.start(Sheet(recipe=recipe, sweep=vary))
    seconds: dict[int, float] = {}
    while (view := read_sweep(sweep)).ended is None:
        _measure(view, seconds)
        time.sleep(_PERIOD_S)
    code = command(["sweep", "show", sweep.id])
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes of processor time in {len(seconds)} trainers")
    return code or int(not view.verdict.is_better)


def _measure(view: SweepView, seconds: dict[int, float]) -> None:
    """Record the CPU time of each trainer so far, by process id."""
    for trial in view.trials:
        if trial.outcome != "training" or trial.run is None:
            continue
        process = read_status(trial.run).process
        # The trainer may have ended meanwhile. Before it has started, the status names its runner.
        with suppress(OSError):
            if (
                process is not None
                and process.is_alive()
                and b"qlora_tui.training" in _read(process.pid, "cmdline")
            ):
                fields = _read(process.pid, "stat").rpartition(b")")[2].split()
                seconds[process.pid] = (int(fields[11]) + int(fields[12])) / _TICKS


def _read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


if __name__ == "__main__":
    sys.exit(main())
