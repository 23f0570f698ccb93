from __future__ import annotations

import pytest

from qlora_tui.recipe.fields import fields
from qlora_tui.training import lr_schedule, optimizers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("setting", "names"),
    [("training.optimizer", optimizers.OPTIMIZERS), ("training.lr_scheduler", lr_schedule.SCHEDULES)],
)
def test_every_choice_of_the_recipe_has_a_name_in_transformers(setting: str, names: dict[str, str]) -> None:
    assert set(fields()[setting].choices) == names.keys()
