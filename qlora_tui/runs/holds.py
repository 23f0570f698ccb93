"""Holds: reasons for which a run waits, each with its condition to go on. Decided from readings, without I/O.

A hold of the hours or for another program has a run save and leave the GPU; the queue keeps it in its place.
A hold for temperature or power has it rest where it is, between two micro-batches: its memory disturbs
nobody, and heat comes and goes within seconds. A job of a cluster that reaches its time limit has its run
save and leave, and asks to be started again. A user's pause has no hold: only ``resume`` ends it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from qlora_tui.decoding import Count, UnixTime
from qlora_tui.gpu.metrics import GpuProcess

_DAY_S = 24 * 3600.0
Cause: TypeAlias = Literal["hours", "program", "temperature", "power", "devices", "limit"]


class Hold(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a run waits, and what it waits for."""

    cause: Cause
    until: UnixTime | None = None
    """When the hours begin; None for other causes."""
    program: str = ""
    """Name of the program that uses the GPU."""
    pid: Count = 0
    devices: str = ""
    """The GPUs that other runs have, or that runs before it wait for: ``GPU 0 (RTX 4090)``."""
    reading: float | None = None
    """Temperature in °C or mean power in W."""
    bound: float | None = None
    """The user's bound for that reading."""

    @property
    def has_left(self) -> bool:
        """Whether the run has left a GPU that it could have: it trains all the same if the user wants."""
        return self.cause in ("hours", "program")


def hold_words(hold: Hold) -> str:
    """What a hold waits for, after "paused", "waiting" or "resting": ``until 23:00 (hours)``."""
    match hold.cause:
        case "hours":
            return f"until {time_words(hold.until or 0.0)} (hours)"
        case "program":
            return f"for {hold.program} (pid {hold.pid})"
        case "devices":
            return f"for {hold.devices}"
        case "limit":
            return "until Slurm starts its job again"
        case "temperature":
            return f"at {hold.reading:.0f} °C (at most {hold.bound:.0f})"
        case "power":
            return f"at {hold.reading:.0f} W (at most {hold.bound:.0f})"


def time_words(at: float) -> str:
    """``23:00``, with the day of the week if that is not within a day."""
    moment = time.localtime(at)
    is_near = 0 <= at - time.time() < _DAY_S
    return time.strftime("%H:%M" if is_near else "%a %H:%M", moment)


class Switch:
    """On once a condition has lasted for a while, and off once it has been clear for a while."""

    def __init__(self, on_after_s: float, off_after_s: float, *, most_off_after_s: float = 0.0) -> None:
        """``most_off_after_s``: each time it goes on soon after it went off, it stays on for twice as long,
        up to this.
        """
        self.is_on = False
        self._on_after_s = on_after_s
        self._least_off_after_s = self._off_after_s = off_after_s
        self._most_off_after_s = max(most_off_after_s, off_after_s)
        self._against_since: float | None = None
        """Since when the condition has been other than this."""
        self._off_at: float | None = None

    def update(self, elapsed_s: float, wants: bool | None, *, at_once: bool = False) -> bool:
        """Return whether it is on.

        Args:
            elapsed_s: Time of the reading, by a clock that nobody sets.
            wants: Whether the condition holds; None where it is between its two bounds: nothing changes.
            at_once: Go on without waiting.
        """
        if wants is None or wants == self.is_on:
            self._against_since = None
            return self.is_on
        if self._against_since is None:
            self._against_since = elapsed_s
        after_s = self._off_after_s if self.is_on else 0.0 if at_once else self._on_after_s
        if elapsed_s - self._against_since >= after_s:
            self.is_on, self._against_since = wants, None
            if not wants:
                self._off_at = elapsed_s
            elif self._off_at is not None:
                is_soon = elapsed_s - self._off_at < SOON_S
                longer = min(2 * self._off_after_s, self._most_off_after_s)
                self._off_after_s = longer if is_soon else self._least_off_after_s
        return self.is_on


SOON_S = 600.0
"""A program that is back within this time has not gone for long."""
_USED_FOR_S = 2.0
_GONE_FOR_S = 30.0
_MOST_GONE_FOR_S = 480.0
_OTHER_BYTES = 1 << 30
"""GPU memory that a program has taken since the run began, from which on it uses the GPU: a desktop and a
browser together take less."""
_BUSY_PERCENT = 20
"""Share of the time in which a program's kernels run, from which on it uses the GPU: moving windows and
videos stay below."""
_SETTLES_FOR_S = 10.0
"""Time from the first reading in which a program that is seen idle counts as one that is always there."""


class Sharing:
    """Whether another program uses one GPU: the processes on it are compared with those at the beginning.

    Programs that are always there, such as a desktop or an idle server, count only while they compute much.
    One that has taken much memory since is waited for until it is gone.
    """

    def __init__(self, waits_for: int = 0) -> None:
        """``waits_for``: number of the process that a run is held for already, by an earlier runner."""
        self._switch = Switch(_USED_FOR_S, _GONE_FOR_S, most_off_after_s=_MOST_GONE_FOR_S)
        self._at_start = {waits_for: 0}
        """Memory of each process when the run began, or was first looked at."""
        self._began_s: float | None = None
        """Time of the first reading."""
        self._waits_for = set[int]()
        """Processes that used the GPU when the hold began: it lasts until their memory is free."""
        self._has_seen_own = False
        self.user: GpuProcess | None = None
        """The program that uses the GPU, or used it last; None before the first."""

    def update(
        self,
        elapsed_s: float,
        processes: Iterable[GpuProcess] | None,
        own: Collection[int],
        *,
        is_training: bool,
    ) -> GpuProcess | None:
        """Return the program that a run on this GPU gives way to; None if it need not.

        Args:
            elapsed_s: Time of the reading, by a clock that nobody sets.
            processes: What the driver lists; None if it lists nothing.
            own: Process numbers of this program.
            is_training: Whether a run trains on it. Then its process must be in the list, or the numbers
                there are those of another namespace, and the run could give way to itself.
        """
        if processes is None:
            return None
        others = [process for process in processes if process.pid not in own]
        memory = {process.pid: process.memory_bytes or 0 for process in others}
        busy = {process.pid for process in others if _is_busy(process)}
        self._began_s = elapsed_s if self._began_s is None else self._began_s
        was_held = self._switch.is_on
        if elapsed_s - self._began_s <= _SETTLES_FOR_S:
            # A desktop that moves a window at the first look is idle at the next.
            self._at_start = {pid: memory[pid] for pid in memory.keys() - busy} | self._at_start
        elif not (is_training or was_held or busy):
            self._at_start = memory
        self._has_seen_own = is_training and (
            self._has_seen_own or any(process.pid in own for process in processes)
        )
        grown = self._grown(memory)
        using = busy | (grown & self._waits_for if was_held else grown)
        users = [process for process in others if process.pid in using]
        if is_training and not self._has_seen_own:
            users = []
        if users:
            is_same = self.user is not None and self.user.pid in [process.pid for process in users]
            self.user = self.user if is_same else max(users, key=lambda each: each.memory_bytes or 0)
        is_held = self._switch.update(elapsed_s, bool(users), at_once=not is_training)
        if is_held and not was_held:
            self._waits_for = {process.pid for process in users}
        elif was_held and not is_held:
            # What came during the hold and stayed is always there from now on.
            self._waits_for, self._at_start = set(), memory
        return self.user if is_held else None

    def _grown(self, memory: Mapping[int, int]) -> set[int]:
        """Return the processes that have taken memory which no other has given back since the run began."""
        pids = memory.keys() | self._at_start.keys()
        taken = {pid: memory.get(pid, 0) - self._at_start.get(pid, 0) for pid in pids}
        given_back, grown = sum(max(0, -each) for each in taken.values()), set[int]()
        for pid in sorted(taken, key=taken.__getitem__, reverse=True):
            if taken[pid] - given_back >= _OTHER_BYTES:
                grown.add(pid)
            given_back = max(0, given_back - max(0, taken[pid]))
        return grown


def _is_busy(process: GpuProcess) -> bool:
    return (process.busy_percent or 0) >= _BUSY_PERCENT


_HOT_FOR_S = 3.0
_COOLER_BY_C = 4
_LESS_POWER = 0.95
_MEAN_POWER_S = 20.0
"""Time constant of the mean power: a run alternates between steps and rests."""


class Bounds:
    """Whether a run should rest: the temperature of its GPU, or its mean power, is above the user's bound."""

    def __init__(self) -> None:
        self._heat = Switch(_HOT_FOR_S, 0.0)
        self._load = Switch(0.0, 0.0)
        self._power_w: float | None = None
        self._read_s = 0.0

    def update(
        self,
        elapsed_s: float,
        *,
        temperature_c: float | None,
        power_w: float | None,
        max_temperature_c: float | None,
        max_power_w: float | None,
    ) -> Hold | None:
        """Return why the run should rest; None if it need not, and for readings that the GPU does not report.

        Args:
            elapsed_s: Time of the readings, by a clock that nobody sets.
            temperature_c: The reading.
            power_w: The reading.
            max_temperature_c: The user's bound; None without one.
            max_power_w: The user's bound for the mean power; None without one.
        """
        if power_w is not None:
            # Exponential mean; the first reading counts as the mean.
            share = min(1.0, (elapsed_s - self._read_s) / _MEAN_POWER_S)
            before = power_w if self._power_w is None else self._power_w
            self._power_w = before + share * (power_w - before)
        self._read_s = elapsed_s
        low_c = None if max_temperature_c is None else max_temperature_c - _COOLER_BY_C
        low_w = None if max_power_w is None else max_power_w * _LESS_POWER
        is_hot = self._heat.update(elapsed_s, _is_above(temperature_c, low_c, max_temperature_c))
        is_loaded = self._load.update(elapsed_s, _is_above(self._power_w, low_w, max_power_w))
        if is_hot:
            return Hold(cause="temperature", reading=temperature_c, bound=max_temperature_c)
        if is_loaded and self._power_w is not None:
            return Hold(cause="power", reading=round(self._power_w), bound=max_power_w)
        return None


def _is_above(reading: float | None, low: float | None, high: float | None) -> bool | None:
    """Return whether a reading is above its bound; None between the two."""
    if reading is None or low is None or high is None:
        return False
    return True if reading > high else False if reading <= low else None
