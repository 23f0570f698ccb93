"""Settings of a run in its preview."""

from __future__ import annotations

from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.tui.screens.runs.run_preview import settings_lines


def test_the_preference_method_of_a_run_is_shown() -> None:
    recipe = Recipe(data=Data(preferences="simpo"))
    shown = [line.plain.split() for line in settings_lines(recipe, 60)]
    assert ["method", "SimPO", "γ", "1"] in shown
    assert not any(line.plain.startswith("method") for line in settings_lines(Recipe(), 60))
