"""What syncing files to the disk costs a run: the same training with ``fsync`` as it is, and with it ignored.

    python -m bench.durability --model MODEL --data FILE [--steps 40] [--repeats 3] [--json]

Each run is the program's own, in a private home, with a checkpoint every ten steps. In the second arm a
preloaded library answers ``fsync`` and ``fdatasync`` at once. The arms alternate; medians. Budget: a step
takes at most 1.01 times as long with the syncs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from bench.support.turns import in_turn
from qlora_tui import paths
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Finished, Step

NO_SYNC = "int fsync(int file) { (void)file; return 0; }\nint fdatasync(int file) { (void)file; return 0; }\n"
ARMS = ("synced", "not synced")
BUDGET = 1.01


def train(args: argparse.Namespace, library: Path | None) -> tuple[float, float]:
    """Seconds of the median step, and of the run from its first step to its end."""
    with tempfile.TemporaryDirectory(prefix="qlora-tui-durability-", ignore_cleanup_errors=True) as home:
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = f"{home}/{kind.lower()}"
        words = ["train", "--preset", "cpu-demo", "--model", args.model, "--data", args.data]
        for setting in (
            f"training.max_steps={args.steps}",
            "training.epochs=100",
            "training.checkpoint_every=10",
        ):
            words += ["--set", setting]
        environment = os.environ | ({"LD_PRELOAD": str(library)} if library else {})
        subprocess.run(
            [sys.executable, "-m", "qlora_tui", *words],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        (folder,) = paths.runs_dir().iterdir()
        events = list(EventTail(RunDir(folder).events_path).drain())
        steps = [event for event in events if isinstance(event, Step)]
        if not isinstance(events[-1], Finished) or len(steps) != args.steps:
            sys.exit(f"The run took {len(steps)} of {args.steps} steps; its last event is {events[-1]}")
        between = [later.at - earlier.at for earlier, later in pairwise(steps)]
        return statistics.median(between), events[-1].at - steps[0].at


def main() -> int:
    """Print both arms and their ratios; 1 where the step is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m bench.durability", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "no_sync.so"
        compiler = shutil.which("cc") or sys.exit("A C compiler named cc is needed.")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-o", library, "-"],
            check=True,
            input=NO_SYNC,
            text=True,
        )
        for repeat in range(args.repeats):
            for arm in in_turn(ARMS, repeat):
                results[arm].append(train(args, library if arm == "not synced" else None))
    step, run = (
        {arm: statistics.median(result[i] for result in results[arm]) for arm in ARMS} for i in (0, 1)
    )
    ratio = step["synced"] / step["not synced"]
    if args.json:
        print(json.dumps({"runs": results, "step_ratio": ratio}))
    else:
        for arm in ARMS:
            print(f"{arm:<12}step {step[arm] * 1000:.1f} ms   run {run[arm]:.2f} s")
        print(
            f"ratio of a step {ratio:.3f} (budget {BUDGET}), of a run {run['synced'] / run['not synced']:.3f}"
        )
    return 0 if ratio <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
