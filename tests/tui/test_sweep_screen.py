"""The window of a sweep and the dialog that starts one, over sweeps whose runs are played."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui.recipe.presets import find_preset, list_presets
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.sweeps import actions
from qlora_tui.sweeps.describe import main_setting, ranked, trial_name, trial_words, what_settings_bought
from qlora_tui.sweeps.directory import all_sweeps
from qlora_tui.sweeps.space import Range, Space, Values
from qlora_tui.sweeps.view import read_sweep
from qlora_tui.tui import system_monitor
from qlora_tui.tui.screens.runs.sweep import SweepScreen, trial_lines
from qlora_tui.tui.screens.runs.sweep_charts import setting_plot, steps_plot
from tests.sweeps.conftest import best_at, no_runner, play_all, recipe, sheet
from tests.tui.sample_data import readable_model, tickets
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import go_to, open_on

__all__ = ["no_runner", "recipe"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_runner_of_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """The app, too, starts no runner: it would train what is played here."""
    monkeypatch.setattr(system_monitor, "ensure_runner", lambda: None)


async def open_sweep(pilot: Pilot[Any]) -> None:
    await go_to(pilot, "6", "Runs")
    await pilot.press("W")
    await wait_for_text(pilot, "learning rate")


async def test_a_finished_sweep_is_judged_and_its_winner_adopted(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe, rounds=2))
    view = play_all(sweep, best_at(4e-4))
    assert view.winner is not None
    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_sweep(pilot)
        for size in ((80, 24), (120, 40), (200, 60)):
            await pilot.resize_terminal(*size)
            await wait_for_text(
                pilot,
                "· finished",
                "Use learning rate 0.0004: loss lower by 0.",
                "(by chance ≤ 0.",
                "mean of seeds 43 and 44; selected with seed 42",
                "mean of seeds 42, 43 and 44",
                "★ trial 3",
                "0.0004",
                "not kept",
                "at 50%",
                "at 100%",
            )
            # The unchanged recipe is in the chart too, and what would have no effect is not offered.
            await wait_until(pilot, lambda: text_of(app).count("○") >= 2)
            assert "pause" not in text_of(app) and "stop" not in text_of(app)
            is_tall = size[1] > 24
            await wait_until(pilot, lambda: ("effect of settings, at 50%" in text_of(app)) == is_tall)  # noqa: B023
        await pilot.press("s")
        await pilot.press(*"mine", "enter")
        await wait_until(pilot, lambda: "mine" in [preset.name for preset in list_presets()])
        assert find_preset("mine").recipe().training.learning_rate == 4e-4
        # A name that is taken is asked about, for as long as the user thinks.
        edited = find_preset("mine").path
        edited.write_text("[lora]\nrank = 4\n")
        await pilot.press("s", *"mine", "enter")
        await wait_for_text(pilot, "replace it")
        screen = next(each for each in app.screen_stack if isinstance(each, SweepScreen))
        screen._refresh()
        await pilot.pause()
        await pilot.press("y")
        await wait_until(pilot, lambda: "learning_rate" in edited.read_text())
        # The list begins with the winner.
        await pilot.press("enter")
        assert view.winner.run is not None
        await wait_for_text(pilot, view.winner.run.name)


async def test_a_running_sweep_is_paused_resumed_given_time_and_stopped(recipe: Recipe) -> None:
    sweep = actions.start(sheet(recipe))
    play_all(sweep, best_at(4e-4), most=3)
    newer = actions.start(sheet(recipe))
    app = open_on("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        # The list begins with the queue, and that with a run of the older sweep.
        await open_sweep(pilot)
        await wait_for_text(pilot, f"{sweep.id} (2 of 2)", "seed 42, finished", "Not better so far: ")
        await pilot.press("z")
        await wait_for_text(pilot, "Paused.", "z resume")
        assert read_sweep(sweep).state == "paused"
        await pilot.press("z")
        await wait_for_text(pilot, "Running: ")
        await pilot.press("a", *"tomorrow", "enter")
        await wait_for_text(pilot, "'tomorrow' is not a duration")
        await pilot.press("ctrl+u", *"2h", "enter")
        await wait_until(pilot, lambda: read_sweep(sweep).deadline is not None)
        await pilot.press("x", "y")
        await wait_for_text(pilot, "· stopped")
        assert read_sweep(sweep).state == "stopped"
        await pilot.press("n")
        await wait_for_text(pilot, f"{newer.id} (1 of 2)", "No result yet")


async def test_a_sweep_is_started_from_the_recipe_on_screen(tmp_path: Path) -> None:
    app = open_on("home", model=readable_model(tmp_path))
    app.workbench.set("data.sources", (Source(path=str(tickets(tmp_path / "tickets.jsonl", 80))),))
    async with app.run_test(size=(120, 40)) as pilot:
        await go_to(pilot, "5", "Sequence length")
        await pilot.press("S")
        await wait_for_text(pilot, "Find better settings", "8 trials in 1 round", "wsd or constant")
        vary = app.screen.query_one("#sweep-vary", Input)
        vary.value = "training.learning_rate=3e-4..1e-4"
        await wait_for_text(pilot, "✗")
        await pilot.press("enter")
        assert all_sweeps() == []
        vary.value = "lora.rank=8,16"
        app.screen.query_one("#sweep-end", Input).value = "3h"
        await wait_for_text(pilot, "number of trials that fit is unknown")
        await pilot.press("enter")
        await wait_until(pilot, lambda: isinstance(app.screen, SweepScreen))
        assert read_sweep(all_sweeps()[0]).deadline is not None


@pytest.mark.parametrize(
    ("rates", "places"),
    [
        ([8e-4, 1e-4, 4e-4], {1e-4: 0.0, 2e-4: 1.0, 4e-4: 2.0, 8e-4: 3.0}),
        (Range(low=4e-4, high=4e-3, log=True, points=3), {2e-4: math.log10(2e-4), 4e-3: math.log10(4e-3)}),
    ],
    ids=["list", "range"],
)
def test_each_result_is_over_its_value_with_the_unchanged_recipe_among_them(
    recipe: Recipe, rates: Values, places: dict[float, float]
) -> None:
    vary: Space = {"training.learning_rate": rates, "lora.rank": [8, 16]}
    view = play_all(actions.start(sheet(recipe, vary, rounds=2)), best_at(4e-4))
    path = main_setting(what_settings_bought(view), {})
    assert path == "training.learning_rate"
    chart = setting_plot(view, path)
    results = sorted(result.loss for trial in view.trials for result in trial.results.values())
    assert sorted(mark.y for mark in chart.marks if mark.symbol == "•") == results
    assert all(chart.x.low < mark.x < chart.x.high for mark in chart.marks)
    unchanged = {mark.x for mark in chart.marks if mark.symbol == "○"}
    assert unchanged == {places[2e-4]}
    assert {mark.x for mark in chart.marks} >= set(places.values()) - {places[2e-4]}
    (best,) = (mark for mark in chart.marks if mark.symbol == "★")
    # Both symbols are at the mean of the runs that the verdict compares, and not at the lowest loss.
    assert view.winner is not None and view.winner.final is not None and view.winner.final.loss < best.y
    assert best.y == view.verdict.found and best == chart.marks[-1]
    for each in (chart, steps_plot(view)):
        losses = {(mark.symbol, mark.y) for mark in each.marks if mark.symbol != "•"}
        assert losses == {("★", view.verdict.found), ("○", view.verdict.base)}
        assert [text for text, _ in each.legend][1:3] == [
            f"★ trial {view.winner.number} (mean)",
            "○ unchanged (mean)",
        ]
    assert trial_words(view, view.winner) == "seed 42, winner"
    # The title of each round is next to its lowest losses.
    titled = [curve for curve in chart.curves if curve.label]
    assert [curve.label for curve in titled] == ["at 50%", "at 100%"]
    lines = [curve.envelope for curve in chart.curves if curve.look != "points"]
    assert lines == [curve.envelope for curve in titled]
    # Trials with equal losses share a line.
    names = [curve.label for curve in steps_plot(view).curves]
    numbers = [number for name in names for number in name.split(", ") if number]
    assert sorted(numbers) == sorted(str(trial.number) for trial in view.of_group(1)) and "" in names
    assert ", " in names[-1] and str(view.winner.number) in names[-1].split(", ")
    assert [curve.envelope.low for curve in titled] == [
        min(trial.results[number].loss for trial in view.of_group(1) if number in trial.results)
        for number in (1, 2)
    ]


def test_a_low_chart_has_only_the_values_that_reached_the_last_round(recipe: Recipe) -> None:
    vary: Space = {"training.learning_rate": [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]}
    view = play_all(actions.start(sheet(recipe, vary, rounds=2)), best_at(8e-4))
    chart = setting_plot(view, "training.learning_rate", only_last=True)
    assert "last round" in chart.legend[0][0]
    values = [label for _, label in chart.x_ticks]
    reached = {trial.values["training.learning_rate"] for trial in view.of_group(1) if 2 in trial.results}
    assert sorted(map(float, values)) == sorted(reached | {2e-4}) and len(values) < 5


def test_a_sweep_in_its_first_round_has_the_losses_of_that_round_only(recipe: Recipe) -> None:
    view = play_all(actions.start(sheet(recipe, rounds=3)), best_at(4e-4), most=3)
    assert [text for text, _ in setting_plot(view, "training.learning_rate").legend] == [
        "by learning rate",
        "○ unchanged at 100%",
    ]
    (_, heading), *rows = trial_lines(view, 74)
    assert "at 25%" in heading.plain and "at 50%" not in heading.plain and len(rows) == len(view.trials)


def test_repeats_are_below_their_run_and_runs_in_order_of_their_results(recipe: Recipe) -> None:
    view = play_all(actions.start(sheet(recipe, rounds=2)), best_at(4e-4))
    names = [trial_name(view, trial) for trial in ranked(view)]
    assert names[0] == str(view.verdict.winner) and len(names) == len(view.trials)
    firsts = [name for name in names if not name.startswith("└")]
    assert names == [firsts[0], *names[1:3], firsts[1], *names[4:6], *firsts[2:]]
    assert firsts[1] == "unchanged" or "unchanged" in firsts[1:3]
