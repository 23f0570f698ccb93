"""A long queue, trained to its end by played trainers while the app shows it; both are killed twice.

    python -m bench.long_queue [--runs N]

The runner, the app and the processes that they start are real; only the trainers compute nothing, so that the
seconds are those of the queue. The exit code is 1 unless every run has been trained once and finished once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil

from bench.app import APP, private_home
from bench.support.played_trainer import install_played_trainer
from bench.terminal import Terminal
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir, all_runs, create_run
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import Finished, RunEnded, Started
from qlora_tui.runs.process import ensure_runner, runner_lock_path
from qlora_tui.runs.status import read_status

_SIZE = (120, 40)


def main() -> int:
    """Train the queue; print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    with private_home(), tempfile.TemporaryDirectory() as scripts:
        os.environ["PYTHONPATH"] = install_played_trainer(Path(scripts))
        began = time.perf_counter()
        runs = [_queued(number) for number in range(args.runs)]
        print(f"queued {args.runs} runs in {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()
        _train(args.runs)
        print(f"trained in {time.perf_counter() - began:.1f} s")
        return _judge(runs)


def _queued(number: int) -> RunDir:
    recipe = Recipe(
        name=f"run {number + 1}",
        model=Model(id="acme/tiny"),
        data=Data(sources=(Source(path="rows.jsonl"),)),
    )
    run = create_run(recipe)
    run_queue.enqueue(run)
    return run


def _train(count: int) -> None:
    """Watch the queue until it is empty and its runner has ended; print what runners and apps took.

    Runner and app are killed when a third and two thirds of the runs have left the queue. The next app starts
    the next runner.
    """
    runners: dict[int, tuple[float, int]] = {}
    apps: list[tuple[float, int]] = []
    ensure_runner()
    for rest in (2 * count // 3, count // 3, 0):
        with Terminal(APP, columns=_SIZE[0], rows=_SIZE[1]) as terminal:
            terminal.wait_for("Train")
            terminal.press("6")
            while (runner := _runner()) is not None or run_queue.waiting():
                if runner is not None:
                    with suppress(psutil.Error):
                        times = runner.cpu_times()
                        runners[runner.pid] = times.user + times.system, runner.memory_info().rss
                    if rest and len(run_queue.waiting()) <= rest:
                        os.kill(runner.pid, signal.SIGKILL)
                        break
                terminal.watch(0.2)
            apps.append((terminal.cpu_s(), terminal.memory_bytes()))
    _print_use("runners", runners.values())
    _print_use("apps", apps)


def _print_use(what: str, use: Collection[tuple[float, int]]) -> None:
    cpu_s, memory_bytes = sum(cpu for cpu, _ in use), max(memory for _, memory in use)
    print(f"{len(use)} {what}: {cpu_s:.1f} s of processor time, at most {memory_bytes / 1e6:.0f} MB")


def _runner() -> psutil.Process | None:
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(runner_lock_path().read_text()))
        if process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _judge(runs: list[RunDir]) -> int:
    """Print how the runs ended; return the exit code."""
    ends = Counter[str]()
    for run in runs:
        events = list(EventTail(run.events_path).drain())
        starts = sum(isinstance(event, Started) for event in events)
        endings = [event for event in events if isinstance(event, RunEnded)]
        is_right = starts == len(endings) == 1 and isinstance(endings[0], Finished)
        is_right = is_right and read_status(run).state == "finished" and not run.unreported_path.exists()
        ends["once, finished" if is_right else f"{starts} starts, {endings}"] += 1
    print("; ".join(f"{count} of {len(runs)} runs: {how}" for how, count in ends.items()))
    is_complete = ends["once, finished"] == len(runs) == len(all_runs())
    return int(not (is_complete and not run_queue.waiting()))


if __name__ == "__main__":
    sys.exit(main())
