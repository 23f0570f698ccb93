"""A run rests while its GPU is above the user's bounds, and no longer."""

from __future__ import annotations

import time

import pytest

from qlora_tui.gpu.metrics import GpuMetrics
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.control import send_request
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.status import Status, write_status
from qlora_tui.training.control_requests import ControlRequests
from qlora_tui.training.distributed import distributed_context
from qlora_tui.training.reporter import Reporter
from qlora_tui.training.rest import Rest
from tests.runs.test_gate import write_config


def reading(temperature_c: int) -> GpuMetrics:
    return GpuMetrics(at=0.0, index=0, temperature_c=temperature_c, power_w=300.0)


class PlayedReporter(Reporter):
    """Has the next second pass whenever the run reports that it rests."""

    def __init__(self, run: RunDir, rest: Rest, temperatures_c: list[int]) -> None:
        """The first reading is of now."""
        super().__init__(run, mute=True)
        self.holds: list[Hold | None] = []
        self.warnings: list[str] = []
        self._rest, self._temperatures_c, self._second = rest, temperatures_c, time.monotonic()

    def read(self) -> None:
        self._rest.read(reading(self._temperatures_c.pop(0)), self._second)
        self._second += 1

    def hold(self, hold: Hold | None) -> None:
        self.holds.append(hold)
        if hold is not None and self._temperatures_c:
            self.read()

    def health(self, kind: str, evidence: str, remedy: str, *, step: int = 0, error: bool = False) -> None:
        self.warnings.append(evidence)


@pytest.fixture
def run() -> RunDir:
    run = create_run(Recipe(name="warm"))
    write_status(run, Status(state="running", at=0.0, process=process_identity()))
    return run


def test_a_hot_gpu_is_waited_for_until_it_is_cooler(run: RunDir) -> None:
    write_config("max_temperature_c = 80")
    rest = Rest()
    reporter = PlayedReporter(run, rest, [79, 81, 82, 83, 84, 80, 78, 77, 76, 75])
    requests = ControlRequests(run, reporter, distributed_context())
    reporter.read()
    rest.take(reporter, requests)
    assert reporter.holds == [] and rest.seconds == 0
    for _ in range(4):
        reporter.read()
    rest.take(reporter, requests)
    *holds, last = reporter.holds
    assert [hold and hold.reading for hold in holds] == [84, 80, 78, 77] and last is None
    assert reporter.warnings == ["The GPU is at 84 °C (at most 80)."]
    rest.take(reporter, requests)
    assert reporter.holds[-1] is None and len(reporter.holds) == len(holds) + 1


def test_a_pause_ends_a_rest(run: RunDir) -> None:
    write_config("max_power_w = 100")
    rest = Rest()
    reporter = PlayedReporter(run, rest, [50, 50])
    requests = ControlRequests(run, reporter, distributed_context())
    reporter.read()
    send_request(run, "pause")
    rest.take(reporter, requests)
    assert requests.stop_kind() == "pause"
    assert reporter.holds == [Hold(cause="power", reading=300, bound=100), None]


def test_a_gpu_that_is_read_no_more_holds_up_nothing(run: RunDir) -> None:
    write_config("max_power_w = 100")
    rest = Rest()
    rest.read(reading(50), time.monotonic())
    assert rest.hold is not None
    rest.read(reading(50), time.monotonic() - 6)
    reporter = PlayedReporter(run, rest, [])
    rest.take(reporter, ControlRequests(run, reporter, distributed_context()))
    assert reporter.holds == [] and rest.seconds == 0
