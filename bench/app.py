"""The app compared with the budgets in ``docs/architecture.md``: its start and its live screen.

    python -m bench.app [--only PART]… [--seconds N] [--keys N] [--repeats N] [--json]

start         first frame and memory, compared with an empty Textual app in turns; medians
leave         time from `q` to the end of the process, and from start to end, compared in the same way
quiet, live   bytes, repaints and CPU time per second, and memory; live: one step per second of a fake trainer
keys          time from key to paint while an empty loop occupies every core
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from bench.baselines.runner import in_turn
from bench.terminal import Terminal
from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import CheckpointSaved, Evaluated, PhaseChanged, SampleGenerated, Started, Step
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from qlora_tui.runs.telemetry import Reading, encode

SIZES = ((80, 24), (160, 50))
APP = [sys.executable, "-m", "qlora_tui"]
EMPTY = """
from textual.app import App
from textual.widgets import Static

class Empty(App):
    BINDINGS = [("q", "quit")]

    def compose(self):
        yield Static("ready")

Empty().run()
"""
_SETTLED_S = 4.0
_READ_S = 1.5
"""Seconds for which an app that has just started is observed."""
MAX_FIRST_FRAME_RATIO = 1.5
MAX_START_TO_EXIT_RATIO = 1.25
MAX_BYTES_PER_S, MAX_CPU_PERCENT, MAX_MEMORY_MB = 3000.0, 5.0, 100.0
MAX_KEY_MS = 100.0
_MILESTONE = 200
"""Number of steps between evaluations, checkpoints and samples of the fake trainer."""


@dataclass(frozen=True)
class Figure:
    """One measured figure."""

    where: str
    what: str
    value: float
    at_most: float | None = None
    """The budget; None if there is none."""

    @property
    def is_missed(self) -> bool:
        """Whether the budget was exceeded."""
        return self.at_most is not None and self.value > self.at_most

    def __str__(self) -> str:
        verdict = ""
        if self.at_most is not None:
            verdict = f"{'MISS' if self.is_missed else 'pass'} (at most {self.at_most:,.4g})"
        return f"{self.where:<24} {self.what:<22} {self.value:>10,.4g}  {verdict}".rstrip()


PROGRAMS = {"empty Textual app": ([sys.executable, "-c", EMPTY], "ready"), "qlora-tui": (APP, "Train")}
"""Command of each program, and a text that its first frame shows."""


def start(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure the first frame and the memory of both apps."""

    def measure(terminal: Terminal, first_frame: float) -> tuple[float, ...]:
        return first_frame, terminal.memory_bytes() / 1e6

    yield from _of_both(measure, ("first frame s", "memory MB"), MAX_FIRST_FRAME_RATIO, options.repeats)


def leave(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure how long both apps take to end."""

    def measure(terminal: Terminal, first_frame: float) -> tuple[float, ...]:
        pressed = time.perf_counter()
        terminal.press("q")
        while terminal.program.poll() is None:
            terminal.read(0.002)
        seconds = time.perf_counter() - pressed
        return first_frame + seconds, seconds

    yield from _of_both(
        measure, ("start to exit s", "key to exit s"), MAX_START_TO_EXIT_RATIO, options.repeats
    )


def _of_both(
    measure: Callable[[Terminal, float], tuple[float, ...]],
    names: tuple[str, ...],
    most: float,
    repeats: int,
) -> Iterator[Figure]:
    """Yield medians of the figures that ``measure`` returns, given a terminal and the seconds to the first
    frame.

    ``most`` bounds the first figure as a multiple of the empty app's.
    """
    measured: dict[str, list[tuple[float, ...]]] = {program: [] for program in PROGRAMS}
    with private_home() as home:
        # Store byte code, as in an installation. Otherwise only our modules would be compiled each time.
        env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{home}/bytecode"}
        for repeat in range(-1, repeats):
            for program in in_turn(PROGRAMS, repeat):
                command, marker = PROGRAMS[program]
                with Terminal(command, env=env) as terminal:
                    first_frame = terminal.wait_for(marker)
                    terminal.watch(_READ_S)
                    figures = measure(terminal, first_frame)
                    if repeat >= 0:  # the first repeat warms up disk and byte code
                        measured[program].append(figures)
    medians = {
        program: [statistics.median(column) for column in zip(*rows, strict=True)]
        for program, rows in measured.items()
    }
    for program, values in medians.items():
        for name, value in zip(names, values, strict=True):
            yield Figure(program, name, value)
    empty, ours = (values[0] for values in medians.values())
    yield Figure("qlora-tui", f"{names[0].removesuffix(' s')} ratio", ours / empty, most)


def quiet(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure the cost of watching a run that does nothing."""
    yield from _costs(options, "quiet")


def live(options: argparse.Namespace) -> Iterator[Figure]:
    """Measure the cost of watching a run that takes a step per second."""
    yield from _costs(options, "live")


def _costs(options: argparse.Namespace, name: str) -> Iterator[Figure]:
    with private_home():
        trainer = FakeTrainer(1200, 3000)
        for size in SIZES:
            trained = trainer.at_work() if name == "live" else contextlib.nullcontext()
            with watching(size) as terminal, trained:
                where = f"{size[0]}x{size[1]} {name}"
                terminal.watch(2.0)
                before, repaints = terminal.cpu_s(), terminal.repaints
                painted = terminal.watch(options.seconds)
                cpu = 100 * (terminal.cpu_s() - before) / options.seconds
                most_bytes = MAX_BYTES_PER_S if size == SIZES[0] else None
                yield Figure(where, "bytes/s", painted / options.seconds, most_bytes)
                yield Figure(where, "repaints/s", (terminal.repaints - repaints) / options.seconds)
                yield Figure(where, "% of a core", cpu, MAX_CPU_PERCENT)
                yield Figure(where, "memory MB", terminal.memory_bytes() / 1e6, MAX_MEMORY_MB)


def keys(options: argparse.Namespace) -> Iterator[Figure]:
    """Open the help, a page of text, at irregular times, and measure how long it takes to appear."""
    with private_home(), FakeTrainer(1200, 3000).at_work(), every_core_taken():
        for size in SIZES:
            with watching(size) as terminal:
                luck, times = random.Random(1), []
                for _ in range(options.keys):
                    if (answer := terminal.answer_s("?", "Help: Train")) is not None:
                        times.append(1000 * answer)
                    terminal.watch(0.2)
                    terminal.press("q")
                    terminal.watch(0.3 + luck.random() * 0.3)
                where = f"{size[0]}x{size[1]} keys"
                yield Figure(where, f"of {options.keys} unanswered", options.keys - len(times), 0)
                if len(times) > 1:
                    cuts = statistics.quantiles(times, n=100, method="inclusive")
                    yield Figure(where, "key to paint p50 ms", cuts[49])
                    yield Figure(where, "key to paint p95 ms", cuts[94], MAX_KEY_MS)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    part.__name__: part for part in (start, leave, quiet, live, keys)
}


@contextlib.contextmanager
def watching(size: tuple[int, int]) -> Iterator[Terminal]:
    """Yield a terminal with the app on its live screen, after it has settled."""
    with Terminal(APP, columns=size[0], rows=size[1]) as terminal:
        terminal.wait_for("Train")
        terminal.watch(_SETTLED_S)
        terminal.press("5")
        terminal.watch(_SETTLED_S)
        yield terminal


@contextlib.contextmanager
def private_home() -> Iterator[str]:
    """Yield a private home folder, so that only our run is shown."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ |= {f"XDG_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("CONFIG", "STATE", "CACHE")}
        try:
            yield home
        finally:
            os.environ.clear()
            os.environ |= before


@contextlib.contextmanager
def every_core_taken() -> Iterator[None]:
    """Run processes that use every core inside the block. They end with this process, however it ends."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


class FakeTrainer:
    """A run of ``total`` steps, of which ``done`` are over. Its own clock advances by one second per step."""

    def __init__(self, done: int, total: int) -> None:
        self.step = 0
        self._total = total
        self._run = create_run(
            Recipe(model=Model(id="bench/model"), data=Data(sources=(Source(path="rows.jsonl"),)))
        )
        self._log = EventWriter(self._run.events_path)
        self._luck = random.Random(1)
        self._began = time.time() - done
        self._log.append(Started(at=self._began, attempt=1, pid=os.getpid()))
        self._log.append(PhaseChanged(at=self._began, phase="training"))
        self._take(done)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Take one step per second inside the block."""
        stop = threading.Event()

        def play() -> None:
            while not stop.wait(1.0):
                self._take(1)

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        yield
        stop.set()
        thread.join()

    def _take(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self._tell_step()
        status = Status(
            state="running",
            at=time.time(),
            process=process_identity(),
            phase="training",
            step=self.step,
            total_steps=self._total,
        )
        write_status(self._run, status)

    def _tell_step(self) -> None:
        luck, step, at = self._luck, self.step, self._began + self.step
        loss = 1.2 + 1.5 * 0.997**step
        self._log.append(
            Step(
                at=at,
                step=step,
                epoch=2 * step / self._total,
                loss=loss + luck.gauss(0, 0.1),
                learning_rate=2e-4 * (1 - step / self._total),
                grad_norm=abs(luck.gauss(0.4, 0.1)),
                tokens=step * 3000,
                tokens_per_s=luck.gauss(2300, 40),
            )
        )
        gpu = GpuMetrics(
            at=at,
            index=0,
            utilization_percent=min(100, round(luck.gauss(96, 3))),
            memory_used_bytes=19_500_000_000,
            memory_total_bytes=25_700_000_000,
            power_w=luck.gauss(310, 15),
            power_limit_w=450.0,
            temperature_c=round(luck.gauss(61, 1)),
            sm_clock_mhz=2520,
            throttle=(),
        )
        with self._run.telemetry_path.open("ab") as file:
            file.write(encode(Reading(at=at, rss_bytes=3_200_000_000, cpu_percent=104.0, gpu=gpu)))
        if step % _MILESTONE == 0:
            self._log.append(Evaluated(at=at, step=step, loss=loss + 0.05, best=True))
            self._log.append(CheckpointSaved(at=at, step=step, folder=f"checkpoints/step-{step}"))
            answer = "I am sorry. I will look.\n" * 3
            self._log.append(SampleGenerated(at=at, step=step, prompt="My parcel is late.", answer=answer))


def main() -> int:
    """Measure, and print each figure with its budget; return 1 if one is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    figures = []
    for name in args.only or PARTS:
        for figure in PARTS[name](args):
            figures.append(figure)
            if not args.json:
                print(figure, flush=True)
    if args.json:
        print(json.dumps({"figures": [asdict(one) for one in figures], "load_average_before": load}))
    return int(any(figure.is_missed for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
