from __future__ import annotations

from dataclasses import replace

from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.charts import plot as draw
from qlora_tui.tui.render.labels import SIGNS
from qlora_tui.tui.screens.runs.compare import compare_plot, differing, read
from qlora_tui.tui.screens.runs.run_table import MARKS
from qlora_tui.tui.screens.runs.screen import RunsScreen
from tests.tui.fake_runs import TICKETS
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import open_runs


async def test_two_marked_runs_are_compared_with_only_what_differs(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("space", "space", "v")
        shown = await wait_for_text(
            pilot, "2 runs compared", "A tickets-a", "B tickets-b", "Learning rate", "tokens"
        )
        assert "0.0001" in shown and "0.0002" in shown
        assert "Micro-batch" not in shown
        await pilot.press("escape")
        assert isinstance(app.screen, RunsScreen)


def test_a_model_by_name_and_by_path_is_no_difference(three_runs: list[RunDir]) -> None:
    by_name, by_path = (
        replace(read(three_runs[0]), recipe=replace_setting(TICKETS, "model.id", model_id))
        for model_id in ("SmolLM2-135M-fa7256748bd9", "/models/converted/SmolLM2-135M-fa7256748bd9")
    )
    assert differing([by_name, by_path]) == []


def test_curves_differ_by_their_symbols_and_not_by_color_alone(three_runs: list[RunDir]) -> None:
    compared = [read(run) for run in three_runs]
    text = "\n".join(line.plain for line in draw(compare_plot(compared), 100, 20))
    assert all(mark in text for mark in "ABC")
    assert not set(MARKS) & {sign for sign, _style in SIGNS.values()}
    assert [name for name, _ in differing(compared)] == ["Rank", "Learning rate"]
