"""Reasons to wait, played: the hours by the clock, other programs and heat by readings."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest

from qlora_tui.gpu.metrics import GpuProcess
from qlora_tui.hours import Clock, Hours
from qlora_tui.runs.holds import SOON_S, Bounds, Hold, Sharing

BERLIN = ZoneInfo("Europe/Berlin")
MIB, GIB = 1 << 20, 1 << 30


def moment(text: str, zone: ZoneInfo = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("hours", "at", "opens_at", "closes_at"),
    [
        ("23:00-07:00", "2026-11-30 22:59:59", "2026-11-30 23:00", "2026-12-01 07:00"),
        ("23:00-07:00", "2026-11-30 23:00", "", "2026-12-01 07:00"),
        ("23:00-07:00", "2026-12-01 06:59:59", "", "2026-12-01 07:00"),
        ("23:00-07:00", "2026-12-01 07:00", "2026-12-01 23:00", "2026-12-02 07:00"),
        # From Friday night through the weekend to Monday morning in one piece.
        ("23:00-07:00, sat-sun", "2026-12-05 12:00", "", "2026-12-07 07:00"),
        ("mon wed 9:00-10:00", "2026-12-01 08:00", "2026-12-02 09:00", "2026-12-02 10:00"),
        ("23-7", "2026-11-30 12:00", "2026-11-30 23:00", "2026-12-01 07:00"),
        ("fri 22:00-06:00", "2026-12-05 05:00", "", "2026-12-05 06:00"),
        ("sun-mon 0:00-24:00", "2026-12-01 12:00", "2026-12-06 00:00", "2026-12-08 00:00"),
        # The clock goes from 2:00 to 3:00, and from 3:00 back to 2:00.
        ("1:00-4:00", "2027-03-28 00:00", "2027-03-28 01:00", "2027-03-28 04:00"),
        ("2:30-4:00", "2027-03-28 00:00", "2027-03-28 03:30", "2027-03-28 04:00"),
        ("1:00-4:00", "2026-10-25 00:00", "2026-10-25 01:00", "2026-10-25 04:00"),
    ],
)
def test_hours_follow_the_local_clock(hours: str, at: str, opens_at: str, closes_at: str) -> None:
    parsed, now = Hours.parse(hours), moment(at)
    assert parsed.opens_at(now, BERLIN) == (moment(opens_at) if opens_at else now)
    assert parsed.is_open(now, BERLIN) == (not opens_at)
    assert parsed.closes_at(now, BERLIN) == moment(closes_at)


def test_the_end_of_a_run_counts_only_hours_inside() -> None:
    nights, noon = Hours.parse("23:00-07:00"), moment("2026-11-30 12:00")
    assert nights.done_at(noon, 9 * 3600, BERLIN) == moment("2026-12-02 00:00")
    assert Hours().done_at(noon, 60, BERLIN) == noon + 60
    # The night in which the clock goes forward is an hour shorter.
    assert nights.done_at(moment("2027-03-27 12:00"), 8 * 3600, BERLIN) == moment("2027-03-29 00:00")
    assert Hours.parse("mon-sun").closes_at(noon, BERLIN) == float("inf")


def test_another_time_zone_has_other_hours() -> None:
    hours, now = Hours.parse("23:00-07:00"), moment("2026-11-30 23:30")
    assert hours.is_open(now, BERLIN) and not hours.is_open(now, ZoneInfo("America/New_York"))


def test_the_clock_goes_with_a_laptop_that_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, clock = tmp_path / "localtime", Clock()
    monkeypatch.setattr("qlora_tui.hours._LOCAL_ZONE", local)
    monkeypatch.delenv("TZ", raising=False)
    assert clock.zone() is None
    for hours in (1, 9):
        # RFC 8536, version 1: one type of local time, and no transitions.
        arrived = tmp_path / "arrived"
        arrived.write_bytes(
            struct.pack(">4s16x6llBB4s", b"TZif", 0, 0, 0, 0, 1, 4, hours * 3600, 0, 0, b"LMT")
        )
        arrived.replace(local)
        zone = clock.zone()
        assert zone is not None and zone is clock.zone()
        assert datetime.now(zone).utcoffset() == timedelta(hours=hours)
    monkeypatch.setenv("TZ", "UTC")
    assert clock.zone() is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("25:00-07:00", "24:00"),
        ("nights", "nights"),
        ("7:5-23:00", "7:5-23:00"),
        ("22:00-06:00,", "between two commas"),
        # All of Saturday, or these hours on it?
        ("sat, mon 22:00-06:00", "`sat mon 22:00-06:00`"),
    ],
)
def test_hours_that_are_not_understood_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Hours.parse(text)


DESKTOP = GpuProcess(1, 400 * MIB, computes=False, busy_percent=8)
BROWSER = GpuProcess(2, 600 * MIB, computes=False, busy_percent=12)
TRAINER = GpuProcess(3, 9 * GIB, busy_percent=90)
GAME = GpuProcess(4, 3 * GIB, computes=False, busy_percent=60)
OLLAMA = GpuProcess(5, 5 * GIB, busy_percent=0)
LARGE_BROWSER = GpuProcess(6, 1300 * MIB, computes=False, busy_percent=12)


class Played:
    """One GPU whose processes are given second by second."""

    def __init__(self, waits_for: int = 0) -> None:
        self.sharing, self.second = Sharing(waits_for), 0

    def seconds_until(
        self, is_held: bool, *processes: GpuProcess, is_training: bool = True, most: int = 900
    ) -> int | None:
        """Play seconds with these processes; return after how many the state is this, None if never."""
        for passed in range(most):
            self.second += 1
            user = self.sharing.update(
                float(self.second), processes, frozenset({TRAINER.pid}), is_training=is_training
            )
            if (user is not None) == is_held:
                return passed
        return None

    def begin(self, *processes: GpuProcess) -> None:
        """Have a run begin next to these processes."""
        self.seconds_until(False, *processes, is_training=False)
        assert self.seconds_until(True, *processes, TRAINER, most=60) is None

    def goes_on_next_to(self, *processes: GpuProcess) -> bool:
        """Whether a run that is held goes on within a minute, and stays."""
        waited_s = self.seconds_until(False, *processes, is_training=False, most=60)
        return waited_s is not None and self.seconds_until(True, *processes, TRAINER) is None


@pytest.mark.parametrize("program", [GAME, OLLAMA])
def test_a_run_gives_way_within_seconds_and_goes_on_within_a_minute(program: GpuProcess) -> None:
    gpu = Played()
    gpu.begin(DESKTOP, BROWSER)
    paused_after = gpu.seconds_until(True, DESKTOP, BROWSER, TRAINER, program)
    assert paused_after is not None and paused_after <= 5
    assert gpu.sharing.user == program
    assert gpu.seconds_until(False, DESKTOP, BROWSER, program, is_training=False) is None
    went_on_after = gpu.seconds_until(False, DESKTOP, BROWSER, is_training=False)
    assert went_on_after is not None and 10 <= went_on_after <= 60


def test_what_is_always_there_does_not_pause_a_run() -> None:
    gpu = Played()
    idle_server = OLLAMA
    gpu.begin(DESKTOP, BROWSER, idle_server)
    assert gpu.seconds_until(True, DESKTOP, BROWSER, TRAINER, idle_server) is None
    # A browser that is opened later, and a window that is moved for a second.
    assert gpu.seconds_until(True, DESKTOP, GpuProcess(9, 700 * MIB, busy_percent=15), TRAINER) is None
    moved = GpuProcess(1, 400 * MIB, computes=False, busy_percent=70)
    assert gpu.seconds_until(True, moved, TRAINER, most=2) is None
    assert gpu.seconds_until(True, DESKTOP, TRAINER) is None


def test_a_server_that_was_there_counts_when_it_computes_or_takes_more() -> None:
    gpu = Played()
    gpu.begin(OLLAMA)
    answering = GpuProcess(OLLAMA.pid, OLLAMA.memory_bytes, busy_percent=80)
    assert gpu.seconds_until(True, TRAINER, answering) is not None
    assert gpu.goes_on_next_to(OLLAMA)
    larger = GpuProcess(OLLAMA.pid, 7 * GIB)
    gpu.seconds_until(True, TRAINER, GpuProcess(OLLAMA.pid, 200 * MIB), most=10)
    # The run began next to this memory. More of it is taken from the run.
    assert gpu.seconds_until(True, TRAINER, OLLAMA) is None
    assert gpu.seconds_until(True, TRAINER, larger) is not None
    assert gpu.seconds_until(False, larger, is_training=False) is None
    assert gpu.goes_on_next_to(OLLAMA)


@pytest.mark.parametrize("idle", [OLLAMA, LARGE_BROWSER])
def test_what_is_idle_at_the_first_look_is_not_waited_for(idle: GpuProcess) -> None:
    # A runner was replaced, or yielding turned on, in mid-run.
    assert Played().seconds_until(True, TRAINER, idle) is None
    gpu = Played()
    assert gpu.seconds_until(True, GAME, idle, is_training=False) == 0
    assert gpu.seconds_until(False, GAME, idle, is_training=False, most=60) is None
    assert gpu.seconds_until(False, GpuProcess(GAME.pid, 3 * GIB), idle, is_training=False) is None
    assert gpu.goes_on_next_to(idle)
    # A desktop that moves a window just then.
    gpu, desktop = Played(), GpuProcess(1, 1200 * MIB, computes=False)
    moved = msgspec.structs.replace(desktop, busy_percent=30)
    assert gpu.seconds_until(True, moved, idle, is_training=False) == 0
    assert gpu.goes_on_next_to(desktop, idle)


def test_what_is_opened_during_a_hold_is_not_waited_for() -> None:
    gpu = Played()
    gpu.begin(DESKTOP)
    gpu.seconds_until(True, DESKTOP, TRAINER, GAME)
    assert gpu.seconds_until(False, DESKTOP, GAME, LARGE_BROWSER, is_training=False) is None
    assert gpu.goes_on_next_to(DESKTOP, LARGE_BROWSER)


def test_a_server_that_restarts_is_no_other_program() -> None:
    gpu = Played()
    gpu.begin(OLLAMA)
    assert gpu.seconds_until(True, TRAINER, most=20) is None
    again = GpuProcess(50, OLLAMA.memory_bytes)
    assert gpu.seconds_until(True, TRAINER, again) is None
    assert gpu.seconds_until(True, TRAINER, again, GpuProcess(51, 2 * GIB)) is not None


def test_the_hold_of_an_earlier_runner_goes_on() -> None:
    gpu = Played(waits_for=OLLAMA.pid)
    assert gpu.seconds_until(True, OLLAMA, BROWSER, is_training=False) == 0
    assert gpu.seconds_until(False, OLLAMA, BROWSER, is_training=False) is None
    assert gpu.goes_on_next_to(BROWSER)


def test_a_run_is_not_begun_while_another_program_computes() -> None:
    gpu = Played()
    assert gpu.seconds_until(True, DESKTOP, GAME, is_training=False) == 0


def test_a_program_that_comes_back_soon_is_waited_for_longer() -> None:
    gpu = Played()
    gpu.begin(DESKTOP)
    waits = []
    for _ in range(7):
        gpu.seconds_until(True, DESKTOP, TRAINER, GAME)
        waits.append(gpu.seconds_until(False, DESKTOP, is_training=False))
        gpu.seconds_until(True, DESKTOP, TRAINER, most=20)
    assert waits == [30, 60, 120, 240, 480, 480, 480]
    gpu.seconds_until(True, DESKTOP, TRAINER, most=round(SOON_S))
    gpu.seconds_until(True, DESKTOP, TRAINER, GAME)
    assert gpu.seconds_until(False, DESKTOP, is_training=False) == 30


def test_a_program_that_flickers_neither_pauses_nor_continues_a_run() -> None:
    gpu = Played()
    gpu.begin(DESKTOP)
    for _ in range(50):
        assert gpu.seconds_until(True, DESKTOP, TRAINER, GAME, most=1) is None
        assert gpu.seconds_until(True, DESKTOP, TRAINER, most=1) is None
    gpu.seconds_until(True, DESKTOP, TRAINER, GAME)
    for _ in range(50):
        assert gpu.seconds_until(False, DESKTOP, is_training=False, most=20) is None
        assert gpu.seconds_until(False, DESKTOP, GAME, is_training=False, most=1) is None


@pytest.mark.parametrize("listed", [None, (GpuProcess(70_001, 9 * GIB, busy_percent=95),)])
def test_a_run_never_gives_way_to_itself(listed: Iterable[GpuProcess] | None) -> None:
    """In a container the driver may list the host's numbers, or nothing."""
    sharing = Sharing()
    for second in range(60):
        user = sharing.update(float(second), listed, frozenset(), is_training=True)
        assert user is None


def play_bounds(power_w: Callable[[bool], float], seconds: int = 600) -> tuple[float, int]:
    """Return the mean power of a run with a bound of 250 W, and how often it rested."""
    bounds, total, rests, is_resting = Bounds(), 0.0, 0, False
    for second in range(seconds):
        watts = power_w(is_resting)
        total += watts
        rested = bounds.update(
            float(second), temperature_c=None, power_w=watts, max_temperature_c=80, max_power_w=250
        )
        rests += rested is not None and not is_resting
        is_resting = rested is not None
    return total / seconds, rests


def test_the_mean_power_stays_below_its_bound() -> None:
    mean_w, rests = play_bounds(lambda is_resting: 60.0 if is_resting else 350.0)
    assert 230 <= mean_w <= 252 and rests > 3
    assert play_bounds(lambda _: 240.0) == (240.0, 0)


def test_a_run_rests_above_its_temperature_until_it_is_cooler() -> None:
    bounds, temperature_c, hottest, rests, is_resting = Bounds(), 60.0, 0.0, 0, False
    for second in range(900):
        # Towards 95 °C in steps and 45 °C in rests, with a time constant of 30 s.
        temperature_c += ((45.0 if is_resting else 95.0) - temperature_c) / 30
        rest = bounds.update(
            float(second),
            temperature_c=round(temperature_c),
            power_w=None,
            max_temperature_c=80,
            max_power_w=None,
        )
        assert rest is None or rest.cause == "temperature"
        rests += rest is not None and not is_resting
        is_resting = rest is not None
        hottest = max(hottest, temperature_c)
    assert hottest <= 83 and rests >= 5


def test_without_bounds_or_readings_a_run_does_not_rest() -> None:
    def rest(temperature_c: float | None, max_temperature_c: float | None) -> Hold | None:
        bounds = Bounds()
        rests = [
            bounds.update(
                float(second),
                temperature_c=temperature_c,
                power_w=400.0,
                max_temperature_c=max_temperature_c,
                max_power_w=None,
            )
            for second in range(20)
        ]
        return rests[-1]

    assert rest(95, None) is None and rest(None, 80) is None
    assert rest(95, 80) == Hold(cause="temperature", reading=95, bound=80)
