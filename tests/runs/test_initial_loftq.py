"""A run that starts from an adapter of LoftQ stays on the 4-bit weights whose rounding errors that holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.errors import UserError
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.toml import dump
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.initial_adapter import with_initial_adapter
from qlora_tui.runs.machine_checks import CheckKind, Machine
from qlora_tui.runs.preflight import preflight
from tests.catalog.models import make_adapter_files
from tests.tui.sample_data import readable_model

LORA = Lora(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))


def adapter(run: RunDir) -> Path:
    """The final adapter of a run, as far as its checks read it."""
    folder = make_adapter_files(run.adapter_dir, layers=30)
    (folder / "recipe.toml").write_text(dump(run.recipe()))
    return folder


def earlier_run(init_weights: str) -> RunDir:
    run = create_run(replace_setting(Recipe(lora=LORA), "lora.init_weights", init_weights))
    adapter(run)
    return run


def further(folder: Path, **settings: object) -> Recipe:
    recipe = replace_setting(Recipe(lora=LORA), "lora.init_from", str(folder))
    for path, value in settings.items():
        recipe = replace_setting(recipe, path.replace("__", "."), value)
    return recipe


def test_each_further_run_is_on_the_weights_of_loftq() -> None:
    first = earlier_run("loftq")
    second = create_run(with_initial_adapter(further(first.adapter_dir)))
    third = with_initial_adapter(further(adapter(second)))
    assert second.recipe().lora.init_weights == third.lora.init_weights == "loftq"
    checkpoint = make_adapter_files(first.checkpoints_dir / "step-3")
    assert with_initial_adapter(further(checkpoint)).lora.init_weights == "loftq"


def test_another_adapter_leaves_the_initial_weights_as_they_are(tmp_path: Path) -> None:
    for folder in (earlier_run("random").adapter_dir, make_adapter_files(tmp_path / "foreign")):
        assert with_initial_adapter(further(folder)).lora.init_weights == "random"


@pytest.mark.parametrize(
    ("began", "settings", "words"),
    [
        ("loftq", {"quantization__method": "none"}, 'Set quantization.method = "nf4"'),
        ("loftq", {"quantization__double_quantization": False}, "double_quantization = true"),
        ("random", {"lora__init_weights": "loftq"}, 'Set lora.init_weights = "random"'),
    ],
)
def test_other_weights_than_those_of_loftq_are_refused(
    began: str, settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    recipe = further(earlier_run(began).adapter_dir, **settings)
    with pytest.raises(UserError) as caught:
        with_initial_adapter(recipe)
    assert words in caught.value.fix
    recipe = replace_setting(recipe, "model.id", readable_model(tmp_path))
    checks = preflight(recipe, Machine(budget_for(None)), read_columnar=False)
    assert [check.fix for check in checks if check.kind is CheckKind.LORA] == [caught.value.fix]
