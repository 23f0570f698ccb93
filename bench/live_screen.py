"""What the live screen costs and how soon it answers, against the budgets of ``docs/architecture.md``.

    python -m bench.live_screen [--only PART]… [--seconds N] [--keys N] [--json]

quiet, live   bytes, repaints and processor time a second, memory; live: a step a second
keys          from key to paint while both cores are taken

In ``keys`` the trainer is a fake (bench/fake_trainer.py) where the demo's model is not at hand, so that only
the screen is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from bench import cpu_load
from bench.fake_trainer import FakeTrainer
from bench.terminal import Terminal
from qlora_tui.demo.demo_model import is_ready, model_folder

SIZES = ((80, 24), (160, 50))
_APP = [sys.executable, "-m", "qlora_tui"]
_SETTLED_S = 4.0
MAX_BYTES_PER_S, MAX_CPU_PERCENT, MAX_MEMORY_MB = 3000.0, 5.0, 100.0
MAX_KEY_MS = 100.0


@dataclass(frozen=True)
class Figure:
    """One thing measured."""

    where: str
    what: str
    value: float
    at_most: float | None = None
    """The budget; None where there is none."""

    def __str__(self) -> str:
        verdict = ""
        if self.at_most is not None:
            verdict = f"{'pass' if self.value <= self.at_most else 'MISS'} (at most {self.at_most:,.4g})"
        return f"{self.where:<34} {self.what:<22} {self.value:>10,.4g}  {verdict}".rstrip()


@dataclass(frozen=True)
class Options:
    """How long to measure."""

    seconds: float
    keys: int


def quiet(options: Options) -> Iterator[Figure]:
    yield from _costs(options, live=False)


def live(options: Options) -> Iterator[Figure]:
    yield from _costs(options, live=True)


def _costs(options: Options, *, live: bool) -> Iterator[Figure]:
    with _home():
        trainer = FakeTrainer(1200, 3000)
        for size in SIZES:
            with _watching(size) as terminal, _fake_run(trainer, live=live):
                where = f"{_name(size)} {'live' if live else 'quiet'}"
                yield from _cost_figures(terminal, where, options.seconds, small=size == SIZES[0])


def _cost_figures(terminal: Terminal, where: str, seconds: float, *, small: bool) -> Iterator[Figure]:
    terminal.watch(2.0)
    before, repaints = terminal.cpu_s(), terminal.repaints
    painted = terminal.watch(seconds)
    cpu = 100 * (terminal.cpu_s() - before) / seconds
    yield Figure(where, "bytes/s", painted / seconds, MAX_BYTES_PER_S if small else None)
    yield Figure(where, "repaints/s", (terminal.repaints - repaints) / seconds)
    yield Figure(where, "% of a core", cpu, MAX_CPU_PERCENT)
    yield Figure(where, "memory MB", terminal.memory_bytes() / 1e6, MAX_MEMORY_MB)


def keys(options: Options) -> Iterator[Figure]:
    model = model_folder() if is_ready() else None
    with _home(), contextlib.ExitStack() as stack:
        if model is not None:
            load = cpu_load.TRAINING
            stack.enter_context(cpu_load.training(model))
        else:
            load = cpu_load.LOOPS
            stack.enter_context(_fake_run(FakeTrainer(1200, 3000)))
            stack.enter_context(cpu_load.loops())
        for size in SIZES:
            with _watching(size) as terminal:
                yield from _key_figures(terminal, f"{_name(size)} {load}", options.keys)


PARTS: dict[str, Callable[[Options], Iterator[Figure]]] = {
    "quiet": quiet,
    "live": live,
    "keys": keys,
}


def _key_figures(terminal: Terminal, where: str, count: int) -> Iterator[Figure]:
    """Open the help, a page of text over the screen, at odd moments; how long until it is seen."""
    luck = random.Random(1)
    answers: list[float | None] = []
    for _ in range(count):
        answers.append(terminal.answer_s("?", "Help: Train"))
        terminal.watch(0.2)
        terminal.press("q")
        terminal.watch(0.3 + luck.random() * 0.3)
    times = sorted(1000 * answer for answer in answers if answer is not None)
    yield Figure(where, f"of {count} keys unanswered", count - len(times), 0)
    if len(times) > 1:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        yield Figure(where, "key to paint p50 ms", cuts[49])
        yield Figure(where, "key to paint p95 ms", cuts[94], MAX_KEY_MS)
        yield Figure(where, "key to paint p99 ms", cuts[98])


@contextlib.contextmanager
def _watching(size: tuple[int, int]) -> Iterator[Terminal]:
    """The app on its live screen, settled."""
    with Terminal(_APP, columns=size[0], rows=size[1]) as terminal:
        terminal.wait_for("Train")
        terminal.watch(_SETTLED_S)
        terminal.press("5")
        terminal.watch(_SETTLED_S)
        yield terminal


@contextlib.contextmanager
def _fake_run(trainer: FakeTrainer, *, live: bool = True) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=trainer.play, args=(stop,), daemon=True)
    if live:
        thread.start()
    yield
    stop.set()
    if live:
        thread.join()


@contextlib.contextmanager
def _home() -> Iterator[None]:
    """A private home, so that only our run is shown."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {f"XDG_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("CONFIG", "STATE", "CACHE")}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def main() -> int:
    """Measure; print each figure beside its budget. 1 where one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    figures = []
    for name in args.only or PARTS:
        for figure in PARTS[name](Options(args.seconds, args.keys)):
            figures.append(figure)
            if not args.json:
                print(figure, flush=True)
    missed = [one for one in figures if one.at_most is not None and one.value > one.at_most]
    if args.json:
        figures = [
            asdict(one) | {"met": None if one.at_most is None else one not in missed} for one in figures
        ]
        print(json.dumps({"figures": figures, "load_average_before": load, "cores": os.cpu_count()}))
    else:
        print(f"{len(missed)} of the budgets missed; load average {load:.1f} before, {os.cpu_count()} cores")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
