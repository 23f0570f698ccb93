"""The learning-rate finder of the Train screen: measure, stop, look again, and use its rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from qlora_tui import paths
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.runs import lr_range_job
from qlora_tui.runs.lr_range import LrRange, RangeSettings, stored_path, write_lr_range
from qlora_tui.runs.lr_range_job import read_stored
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.axis import Axis, ticks
from qlora_tui.tui.screens.train.lr_finder import LrFinderScreen
from tests.support.lr_range_worker_stub import SHOWN_STEPS, curve_steps
from tests.tui.fake_runs import BEGAN
from tests.tui.sample_data import tickets
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_on

Snapshot = Callable[..., bool]
STUB = "tests.support.lr_range_worker_stub"


@pytest.fixture
def app(model: str, here: Path, same_machine: None) -> QloraApp:
    """The app on Train with a recipe that can start."""
    tickets(here / "tickets.jsonl")
    app = open_on("train", model=model)
    app.workbench.set("data.sources", (Source(path="tickets.jsonl"),))
    return app


def store(recipe: Recipe, fall: float = 0.4) -> LrRange:
    """Store a complete test of a recipe, as if it was measured before."""
    settings = RangeSettings()
    lr_range = LrRange(
        settings=settings,
        measured_at=BEGAN,
        seconds=231.0,
        steps=curve_steps(settings, fall),
        diverged=True,
    )
    write_lr_range(stored_path(recipe), lr_range)
    return lr_range


async def open_finder(pilot: Pilot[Any]) -> None:
    await wait_for_text(pilot, "Find rate", "Micro-batch")
    await pilot.press("f")
    await wait_for_text(pilot, "Learning-rate finder")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_looks_of_a_stored_curve(snap_compare: Snapshot, app: QloraApp, size: tuple[int, int]) -> None:
    """Not of the screen behind it, which every new setting changes."""
    store(app.workbench.recipe)

    async def open_alone(pilot: Pilot[Any]) -> None:
        await open_finder(pilot)
        pilot.app.screen.styles.background = "black"

    assert snap_compare(app, terminal_size=size, run_before=open_alone)


async def test_a_curve_without_answer_changes_nothing(app: QloraApp) -> None:
    store(app.workbench.recipe, fall=0.001)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_finder(pilot)
        shown = await wait_for_text(pilot, "No suggestion: the loss did not fall", "r measure again")
        assert "Enter use" not in shown
        await pilot.press("enter")
        assert isinstance(app.screen, LrFinderScreen)
        await pilot.press("escape")
        assert app.workbench.recipe.training.learning_rate == 2e-4


async def test_closing_the_window_stops_the_test(app: QloraApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", STUB)
    async with app.run_test(size=(80, 24)) as pilot:
        await open_finder(pilot)
        await wait_for_text(pilot, "Trains this recipe", "Enter start")
        await pilot.press("enter")
        await wait_for_text(pilot, f"Step {SHOWN_STEPS} of at most 60", "Esc stop and close")
        assert any(paths.runs_dir().iterdir())
        await pilot.press("escape")
        await wait_until(pilot, lambda: not any(paths.runs_dir().iterdir()))
        assert read_stored(app.workbench.recipe) is None


async def test_an_error_is_shown_in_the_window(app: QloraApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", "no_such_module")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_finder(pilot)
        await pilot.press("enter")
        await wait_for_text(pilot, "The measurement failed", "Enter start")


async def test_a_measured_curve_is_shown_again_and_used(
    app: QloraApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lr_range_job, "WORKER", STUB)
    monkeypatch.setenv("LR_RANGE_STEPS", "50")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_finder(pilot)
        await pilot.press("enter")
        await wait_for_text(pilot, "Enter use")
        await pilot.press("escape")
        await open_finder(pilot)
        await wait_for_text(pilot, "50 steps", "◆ suggested", "○ recipe 2e-4", "Enter use")
        await pilot.press("enter")
        await wait_until(pilot, lambda: any("rate set to" in toast.message for toast in app._notifications))
        assert 3e-4 < app.workbench.recipe.training.learning_rate < 6e-4
        await pilot.press("u")
        assert app.workbench.recipe.training.learning_rate == 2e-4


def test_a_logarithmic_axis_is_labeled_with_powers_of_ten() -> None:
    axis = Axis(-6.0, -1.0, is_log=True)
    assert ticks(axis, 10) == [(float(power), f"1e{power}") for power in range(-6, 0)]
    assert [label for _, label in ticks(axis, 3)] == ["1e-6", "1e-4", "1e-2"]
