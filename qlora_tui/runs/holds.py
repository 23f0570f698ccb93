"""Holds: reasons for which a run waits, each with the condition for continuing.

The rules in this module get readings as arguments and do no I/O.

A hold for the training hours or for another program makes a run save and free the GPU; the run keeps its
place in the queue. A hold for temperature or power makes the run rest between two micro-batches without
freeing memory, because heat changes within seconds. A cluster job that reaches its time limit makes its run
save and end, and requests to be started again. A pause by the user is not a hold, because only ``resume``
ends it.
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
    """The reason why a run waits, and the condition for continuing."""

    cause: Cause
    until: UnixTime | None = None
    """Unix time at which the training hours begin; None for other causes."""
    program: str = ""
    """Name of the program that uses the GPU."""
    pid: Count = 0
    devices: str = ""
    """The GPUs that the run waits for, because other runs are using them or are ahead of it in the queue:
    ``GPU 0 (RTX 4090)``.
    """
    reading: float | None = None
    """Temperature in °C or mean power in W."""
    bound: float | None = None
    """The user's limit for this reading."""

    @property
    def has_left(self) -> bool:
        """Whether the run leaves a GPU unused because of the training hours or another program. The user can
        make the run train anyway.
        """
        return self.cause in ("hours", "program")


def hold_words(hold: Hold) -> str:
    """Return what a held run waits for, as words to put after "paused", "waiting" or "resting": ``until 23:00
    (hours)``.
    """
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
    """Return a time such as ``23:00``, with the day of the week unless it is within the next 24 hours."""
    moment = time.localtime(at)
    is_near = 0 <= at - time.time() < _DAY_S
    return time.strftime("%H:%M" if is_near else "%a %H:%M", moment)


class Switch:
    """A switch with delays. It turns on once a condition has held for a while, and off once the condition has
    been false for a while.
    """

    def __init__(self, on_after_s: float, off_after_s: float, *, most_off_after_s: float = 0.0) -> None:
        """Create a switch that is off.

        If it turns on again soon after it turned off, the delay before turning off doubles, up to
        ``most_off_after_s``.
        """
        self.is_on = False
        self._on_after_s = on_after_s
        self._least_off_after_s = self._off_after_s = off_after_s
        self._most_off_after_s = max(most_off_after_s, off_after_s)
        self._against_since: float | None = None
        """Time since which the condition has differed from the state of the switch."""
        self._off_at: float | None = None

    def update(self, elapsed_s: float, wants: bool | None, *, at_once: bool = False) -> bool:
        """Update the switch with a reading, and return whether it is on.

        Args:
            elapsed_s: Time of the reading, by a monotonic clock.
            wants: Whether the condition holds; None if the reading is between its two bounds. Then the switch
                keeps its state, and a delay begins anew.
            at_once: Turn on without a delay.
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
"""If a switch turns on again within this many seconds after it turned off, its delay before turning off
doubles.
"""
_USED_FOR_S = 2.0
_GONE_FOR_S = 30.0
_MOST_GONE_FOR_S = 480.0
_OTHER_BYTES = 1 << 30
"""A program counts as using the GPU if it has taken at least this much GPU memory since the run began.

A desktop and a browser together take less.
"""
_BUSY_PERCENT = 20
"""A program counts as using the GPU if its kernels run for at least this percentage of the time.

Moving windows and videos stay below.
"""
_SETTLES_FOR_S = 10.0
"""For this many seconds after the first reading, idle programs are recorded as permanent."""


class Sharing:
    """Determines whether another program uses a GPU, by comparing the GPU's processes with those at the start
    of the run.

    Permanent programs, such as a desktop or an idle server, count only while they compute much. If a program
    has taken much memory since the run began, the run waits until the program has freed it.
    """

    def __init__(self, waits_for: int = 0) -> None:
        """Begin without readings. ``waits_for``: PID of the process that the run is already waiting for; 0 if
        none.
        """
        self._switch = Switch(_USED_FOR_S, _GONE_FOR_S, most_off_after_s=_MOST_GONE_FOR_S)
        self._at_start = {waits_for: 0}
        """Memory of each process when the run began, or at the first reading."""
        self._began_s: float | None = None
        """Time of the first reading."""
        self._waits_for = set[int]()
        """Processes that used the GPU when the hold began. The hold lasts until their memory is free."""
        self._has_seen_own = False
        self.user: GpuProcess | None = None
        """The program that uses the GPU, or used it last; None before the first one."""

    def update(
        self,
        elapsed_s: float,
        processes: Iterable[GpuProcess] | None,
        own: Collection[int],
        *,
        is_training: bool,
    ) -> GpuProcess | None:
        """Return the program that a run on this GPU must yield to; None if there is none.

        Args:
            elapsed_s: Time of the reading, by a monotonic clock.
            processes: Processes on the GPU; None if the driver cannot list them.
            own: Process ids of this program.
            is_training: Whether a run trains on this GPU. Then other programs are ignored until one of
                ``own`` has been listed. If none is, the ids belong to another namespace, and the run might
                yield to itself.
        """
        if processes is None:
            return None
        others = [process for process in processes if process.pid not in own]
        memory = {process.pid: process.memory_bytes or 0 for process in others}
        busy = {process.pid for process in others if _is_busy(process)}
        self._began_s = elapsed_s if self._began_s is None else self._began_s
        was_held = self._switch.is_on
        if elapsed_s - self._began_s <= _SETTLES_FOR_S:
            # A desktop that moves a window at the first reading is idle at the next.
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
            # Programs that appeared during the hold and remain are permanent from now on.
            self._waits_for, self._at_start = set(), memory
        return self.user if is_held else None

    def _grown(self, memory: Mapping[int, int]) -> set[int]:
        """Return the processes that have taken at least ``_OTHER_BYTES`` since the run began, not counting
        memory that other processes have released.
        """
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
"""Time constant of the mean power, in seconds. A mean is used because a run alternates between steps and
rests.
"""


class Bounds:
    """Decides whether a run should rest because its GPU's temperature or mean power exceeds the user's
    limit.
    """

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
        """Return why the run should rest; None if it need not, or if the GPU does not report the reading.

        Args:
            elapsed_s: Time of the readings, by a monotonic clock.
            temperature_c: Temperature of the GPU.
            power_w: Current power.
            max_temperature_c: The user's limit of the temperature; None without a limit.
            max_power_w: The user's limit of the mean power; None without a limit.
        """
        if power_w is not None:
            # An exponential mean that starts with the first reading.
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
    """Return whether a reading is above its upper bound; None between the two bounds."""
    if reading is None or low is None or high is None:
        return False
    return True if reading > high else False if reading <= low else None
