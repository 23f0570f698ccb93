"""What the live screen costs, and how soon it answers, beside what it may.

    python -m bench.live_screen [--only PART]… [--seconds N] [--keys N] [--json]

quiet, live   bytes, repaints and processor time a second, memory; live: a step a second
keys          from key to paint while both cores are taken
link          the same over 50 kB/s with 200 ms each way: how far what is seen lags behind
session       eight hours of steps at some 45 times their pace: memory and keys every two hours
beside        what ``live`` measures, of ours and of ``btop`` and ``nvitop`` where they are installed

``keys`` measures those two as well, by what their own key for help takes. In ``keys`` the trainer is a fake
(bench/fake_trainer.py), so that only the screen is measured.
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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from bench import cpu_load, other_tuis
from bench.fake_trainer import FakeTrainer
from bench.other_tuis import Help, Neighbour
from bench.terminal import Link, Terminal
from qlora_tui.demo.demo_model import is_ready, model_folder

SIZES = ((80, 24), (160, 50))
_APP = [sys.executable, "-m", "qlora_tui"]
OURS = Help("?", "Help: Train", "q")
_SETTLED_S = 4.0
_LINK_BYTES_PER_S, _LINK_DELAY_S = 50_000.0, 0.2
_HOUR_STEPS = 3600
_SESSION_BEGAN = 600
_SETTLED_STEPS = 900
"""A quarter of an hour, a look a step, before the first hour: most caches of Textual and Rich are full."""
_LOOK_EVERY_S = 0.03
_HURRIED = f"""
from qlora_tui.cli.main import main
from qlora_tui.tui import app
from qlora_tui.tui.screens.train import screen as train
app.LOOK_EVERY_S = train.LOOK_EVERY_S = {_LOOK_EVERY_S}
main([])
"""
"""The app, looking 33 times a second: an eight-hour session of minutes has more looks so."""

MAX_BYTES_PER_S, MAX_CPU_PERCENT, MAX_MEMORY_MB = 3000.0, 5.0, 100.0
MAX_GROWN_MB = 3.0
"""From the first quarter of an hour to the eighth hour: what is left of bounded caches, and holes."""
MAX_KEY_MS, MAX_BEHIND_S = 100.0, 1.0


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
            for other in other_tuis.installed():
                with _beside(other, size) as terminal:
                    where = f"{_name(size)} {other.name}, {load}"
                    figures = _key_figures(terminal, where, options.keys, other.help)
                    yield from map(_without_budget, figures)


def link(options: Options) -> Iterator[Figure]:
    with _home(), _fake_run(FakeTrainer(1200, 3000)):
        for size in SIZES:
            line = Link(_LINK_BYTES_PER_S, _LINK_DELAY_S)
            with _watching(size, link=line) as terminal:
                where = f"{_name(size)} 50 kB/s, 200 ms"
                yield Figure(where, "seconds behind, opening", terminal.most_behind_s, MAX_BEHIND_S)
                terminal.most_behind_s = 0.0
                terminal.watch(options.seconds)
                yield Figure(where, "seconds behind, live", terminal.most_behind_s, MAX_BEHIND_S)
                terminal.most_behind_s = 0.0
                yield from _key_figures(terminal, where, options.keys // 4, most_ms=1000 * MAX_BEHIND_S)
                yield Figure(where, "seconds behind, keys", terminal.most_behind_s, MAX_BEHIND_S)


def session(options: Options) -> Iterator[Figure]:
    with _home():
        last = 8 * _HOUR_STEPS
        trainer = FakeTrainer(_SESSION_BEGAN, last)
        with _watching(SIZES[1], command=[sys.executable, "-c", _HURRIED]) as terminal:
            began, repaints, memory = time.monotonic(), terminal.repaints, list[float]()
            _hurry(trainer, terminal, _SESSION_BEGAN + _SETTLED_STEPS, steps_a_look=1)
            for hours in (0, 2, 4, 6, 8):
                # Room for the keys, which are pressed at the pace of a second a step.
                _hurry(trainer, terminal, hours * _HOUR_STEPS - 2 * options.keys, steps_a_look=2)
                where = f"{_name(SIZES[1])} after {hours} hours"
                with _fake_run(trainer):
                    yield from _key_figures(terminal, where, options.keys)
                memory.append(terminal.memory_bytes() / 1e6)
                yield Figure(where, "memory MB", memory[-1], MAX_MEMORY_MB)
            where = f"{_name(SIZES[1])} 8 hours"
            yield Figure(where, "MB grown", memory[-1] - memory[0], MAX_GROWN_MB)
            yield Figure(where, "times the pace", (last - _SESSION_BEGAN) / (time.monotonic() - began))
            yield Figure(where, "repaints", terminal.repaints - repaints)


def _hurry(trainer: FakeTrainer, terminal: Terminal, step: int, steps_a_look: int) -> None:
    """On to a step of the session."""
    due = time.monotonic()
    while trainer.step < step:
        trainer.take(steps_a_look)
        due += _LOOK_EVERY_S
        terminal.watch(max(0.001, due - time.monotonic()))


def beside(options: Options) -> Iterator[Figure]:
    with _home():
        trainer = FakeTrainer(1200, 3000)
        for size in SIZES:
            with _watching(size) as terminal, _fake_run(trainer):
                where = f"{_name(size)} qlora-tui"
                yield from _cost_figures(terminal, where, options.seconds, small=size == SIZES[0])
            for other in other_tuis.installed():
                with _beside(other, size) as terminal:
                    figures = _cost_figures(
                        terminal, f"{_name(size)} {other.name}", options.seconds, small=False
                    )
                    yield from map(_without_budget, figures)


@contextlib.contextmanager
def _beside(other: Neighbour, size: tuple[int, int]) -> Iterator[Terminal]:
    """Another program, settled."""
    with Terminal(other.command, columns=size[0], rows=size[1], env=other.env) as terminal:
        terminal.watch(_SETTLED_S)
        yield terminal


def _without_budget(figure: Figure) -> Figure:
    return replace(figure, at_most=None)


PARTS: dict[str, Callable[[Options], Iterator[Figure]]] = {
    "quiet": quiet,
    "live": live,
    "keys": keys,
    "link": link,
    "session": session,
    "beside": beside,
}


def _key_figures(
    terminal: Terminal, where: str, count: int, asks: Help = OURS, most_ms: float = MAX_KEY_MS
) -> Iterator[Figure]:
    """Open the help, a page of text over the screen, at odd moments; how long until it is seen."""
    luck = random.Random(1)
    answers: list[float | None] = []
    for _ in range(count):
        answers.append(terminal.answer_s(asks.key, asks.shows))
        terminal.watch(0.2)
        terminal.press(asks.closes)
        terminal.watch(0.3 + luck.random() * 0.3)
    times = sorted(1000 * answer for answer in answers if answer is not None)
    yield Figure(where, f"of {count} keys unanswered", count - len(times), 0)
    if len(times) > 1:
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        yield Figure(where, "key to paint p50 ms", cuts[49])
        yield Figure(where, "key to paint p95 ms", cuts[94], most_ms)
        yield Figure(where, "key to paint p99 ms", cuts[98])


@contextlib.contextmanager
def _watching(
    size: tuple[int, int], *, link: Link | None = None, command: list[str] | None = None
) -> Iterator[Terminal]:
    """The app on its live screen, settled."""
    with Terminal(command or _APP, columns=size[0], rows=size[1], link=link) as terminal:
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
