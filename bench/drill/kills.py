"""Rows of the drill: processes killed, stopped and resumed during a real run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.drill import runs
from bench.drill.program import Failure, write
from bench.drill.samples import jsonl
from qlora_tui.runs.directory import all_runs
from qlora_tui.runs.status import ACTIVE, read_status


def killed(luck: random.Random, materials: Path, home: Path) -> None:
    """kill -9 of trainer, runner or both at a random moment, one to three times; then resume to the end."""
    with runs.started(materials, home) as run:
        for _ in range(luck.randint(1, 3)):
            if luck.random() < 0.4:
                time.sleep(luck.uniform(0, 6))
            else:
                runs.wait_for_step(run, min(read_status(run).step + luck.randint(1, 8), runs.STEPS))
                time.sleep(luck.uniform(0, 0.1))
            runs.send_signal(signal.SIGKILL, _some_modules(luck))
            if luck.random() < 0.5:
                runs.program("resume", run.id)
        runs.resume_to_the_end(run, most=4)
        runs.check_finished(run)


def resumed_at_once(luck: random.Random, materials: Path, home: Path) -> None:
    """Pause or stop, and resume before the trainer is gone: nothing is said to have failed."""
    with runs.started(materials, home) as run:
        runs.wait_for_step(run, luck.randint(1, 10))
        done = runs.program(luck.choice(("pause", "stop")), run.id)
        if done.returncode and read_status(run).state != "finished":
            raise Failure(f"the request failed: {done.stderr[-300:]}")
        runs.wait_until(run, lambda status: status.state not in ACTIVE, "paused or stopped", every_s=0.01)
        time.sleep(luck.choice((0, 0, 0.1, 0.3, 1)))
        runs.resume_to_the_end(run)
        runs.check_no_failure(run)
        runs.check_finished(run)


def signalled(luck: random.Random, materials: Path, home: Path) -> None:
    """Signals that end a process, to trainer, runner or both; or a stop of a second."""
    with runs.started(materials, home) as run:
        runs.wait_for_step(run, luck.randint(1, 10))
        number = luck.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGSTOP))
        if luck.random() < 0.2:
            number = signal.Signals(signal.SIGRTMIN)
        runs.send_signal(number, _some_modules(luck))
        if number == signal.SIGSTOP:
            time.sleep(1)
            runs.send_signal(signal.SIGCONT)
        runs.resume_to_the_end(run)
        runs.check_finished(run)


def killed_verb(luck: random.Random, materials: Path, home: Path) -> None:
    """kill -9 of `train` within its first moments: no run is stranded and nothing is left behind."""
    rows = write(home / "rows.jsonl", jsonl())
    words = [sys.executable, "-m", "qlora_tui", "train", "--preset", "cpu-demo", "--print-command"]
    words += ["--model", str(materials / "model"), "--data", str(rows)]
    verb = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = home / "state" / "qlora-tui" / "runs"
    until = time.monotonic() + 30
    while verb.poll() is None and time.monotonic() < until and not any(folder.glob("*")):
        time.sleep(0.001)
    time.sleep(luck.uniform(0, 0.012))
    verb.kill()
    verb.wait()
    for run in all_runs():
        state = read_status(run).state
        if state not in ("stopped", "queued"):
            raise Failure(f"after a killed `train` the run is {state}")
    done = runs.program("runs", "check", "--repair")
    if done.returncode:
        raise Failure(
            f"`runs check --repair` after a killed `train`: {done.stdout[-300:]}{done.stderr[-300:]}"
        )


def _some_modules(luck: random.Random) -> tuple[str, ...]:
    """Trainers, runners or both."""
    return luck.choice((runs.MODULES[:1], runs.MODULES[1:], runs.MODULES))
