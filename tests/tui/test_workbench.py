from __future__ import annotations

import shutil
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

from qlora_tui import memory, paths
from qlora_tui.catalog.local_models import ModelNotFoundError
from qlora_tui.catalog.model_validation import MissingFilesError
from qlora_tui.errors import UserError
from qlora_tui.memory import Device
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.tui import workbench as workbench_module
from qlora_tui.tui.draft import Draft, open_workbench
from qlora_tui.tui.render.labels import recipe_line
from qlora_tui.tui.workbench import Workbench
from tests.tui.workstation import CONFIGS, config_folder


def test_a_draft_comes_back_as_it_was_left() -> None:
    workbench = Workbench(preset="paper")
    workbench.set("lora.rank", 8)
    workbench.set("data.sources", (Source(path="rows.jsonl"),))
    Draft().save(workbench, replace=True)
    again = open_workbench(Draft())
    assert again.recipe == workbench.recipe
    assert again.preset == "paper"
    assert again.modified


def test_a_damaged_draft_is_a_fresh_start() -> None:
    (paths.state_dir() / "draft.toml").write_text("# began as paper\nlora = 3\n")
    assert open_workbench(Draft()).preset == "balanced"


def test_a_draft_outlives_the_preset_it_began_as() -> None:
    workbench = Workbench()
    workbench.set("model.id", "some/model")
    workbench.set("lora.rank", 8)
    Draft().save(workbench, replace=True)
    path = paths.state_dir() / "draft.toml"
    path.write_text(path.read_text().replace("began as balanced", "began as gone"))
    again = open_workbench(Draft())
    assert again.recipe == workbench.recipe
    assert again.preset == "balanced"
    assert again.modified


@pytest.mark.parametrize("drafted", [True, False])
def test_a_users_broken_default_preset_does_not_block_the_start(drafted: bool) -> None:
    workbench = Workbench()
    workbench.set("lora.rank", 8)
    if drafted:
        Draft().save(workbench, replace=True)
    (paths.user_presets_dir() / "balanced.toml").write_text("nonsense = [\n")
    again = open_workbench(Draft())
    assert again.recipe == (workbench.recipe if drafted else Recipe())
    assert again.preset == "" and again.preset_error is not None
    assert "balanced.toml" in str(again.preset_error)
    Draft().save(again, replace=True)
    assert open_workbench(Draft()).recipe == again.recipe
    (paths.user_presets_dir() / "balanced.toml").unlink()
    assert open_workbench(Draft()).preset == "balanced"


def test_names_with_wide_characters_are_shortened_before_numbers_are_cut() -> None:
    workbench = Workbench()
    recipe = replace_setting(workbench.recipe, "model.id", "Qwen/Qwen2.5-7B-Instruct")
    source = Source(path="/data/客户支持工单训练数据集第二版本.jsonl")
    workbench.replace(replace_setting(recipe, "data.sources", (source,)))
    for width in range(76, 120):
        line = recipe_line(workbench, width)
        assert cell_len(line) <= width and line.endswith(" 1 × 8"), line


def test_undo_and_redo_walk_the_changes() -> None:
    workbench = Workbench()
    first = workbench.recipe
    workbench.set("lora.rank", 8)
    workbench.set("lora.rank", 64)
    assert workbench.undo() and workbench.recipe.lora.rank == 8
    assert workbench.undo() and workbench.recipe == first
    assert not workbench.undo()
    assert workbench.redo() and workbench.recipe.lora.rank == 8
    workbench.set("lora.alpha", 1.0)
    assert not workbench.redo()


def test_a_value_out_of_bounds_changes_nothing() -> None:
    workbench = Workbench()
    with pytest.raises(UserError, match=r"lora\.rank"):
        workbench.set("lora.rank", 0)
    assert not workbench.modified


def test_opening_a_preset_keeps_name_model_and_data() -> None:
    workbench = Workbench()
    workbench.set("name", "vicuna-1")
    workbench.saved_as("mine")
    assert workbench.preset_recipe.name == "vicuna-1" and not workbench.modified
    workbench.set("name", "")
    assert not workbench.modified
    workbench.set("name", "vicuna-2")
    workbench.set("model.id", "acme/tiny")
    workbench.set("data.sources", (Source(path="rows.jsonl"),))
    workbench.open_preset("paper")
    assert workbench.recipe.lora.rank == 64 and workbench.recipe.name == "vicuna-2"
    assert workbench.recipe.model.id == "acme/tiny"
    assert workbench.recipe.data.sources[0].path == "rows.jsonl"
    assert not workbench.modified


@pytest.mark.slow
def test_a_model_whose_weights_arrive_can_be_trained(private_home: Path) -> None:
    folder = config_folder(private_home, "HuggingFaceTB__SmolLM2-135M", has_weights=False)
    workbench = Workbench()
    workbench.set("model.id", str(folder))
    refusal = workbench.model_refusal()
    assert isinstance(refusal, MissingFilesError)
    config_folder(private_home, "HuggingFaceTB__SmolLM2-135M")
    assert workbench.model_refusal() is None
    workbench.set("model.id", "org/missing")
    assert isinstance(workbench.model_refusal(), ModelNotFoundError)


def test_an_architecture_may_be_forgotten_while_a_thread_reads_it(tmp_path: Path) -> None:
    workbench = Workbench()
    shutil.copy(CONFIGS / "Qwen__Qwen2.5-7B.json", tmp_path / "config.json")
    workbench.set("model.id", str(tmp_path))
    workbench.on_outline = lambda model: workbench.forget_architecture()
    read = workbench.architecture()
    assert not isinstance(read, UserError) and read.is_outline
    assert not isinstance(workbench.comparison(Device()), UserError)


@pytest.fixture
def instant_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are read without files."""
    read = SimpleNamespace(is_outline=False)
    monkeypatch.setattr(workbench_module, "_read", lambda model: read)


@pytest.mark.usefixtures("instant_models")
@pytest.mark.parametrize("asked", ["first", "second"])
def test_an_estimate_is_of_the_recipe_it_is_cached_for(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    workbench, device = Workbench(), Device()
    monkeypatch.setattr(memory, "compare", lambda recipe, *_, **__: recipe.name)
    # A recipe that is edited whenever a thread has read it.
    edits = cycle((Recipe(name="first"), Recipe(name="second")))
    monkeypatch.setattr(Workbench, "recipe", property(lambda self: next(edits)))
    workbench.comparison(device)
    monkeypatch.setattr(Workbench, "recipe", Recipe(name=asked))
    compared: Any = workbench.comparison(device)
    assert compared == asked
