"""What there is to talk to in a run, and whether it fits into memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_tui.catalog.described import describe
from qlora_tui.chat.chat_sources import chat_bytes, choose_adapter, run_source
from qlora_tui.errors import UserError
from qlora_tui.memory import Device
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs.directory import RunDir, create_run
from tests.tui.workstation import config_of

RECIPE = Recipe(name="tale", model=Model(id="org/model"))


@pytest.fixture
def run() -> RunDir:
    return create_run(RECIPE)


def put_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def put_checkpoint(run: RunDir, step: int) -> None:
    (put_adapter(run.checkpoints_dir / f"step-{step}") / "complete").touch()


def test_a_finished_run_offers_adapter_then_checkpoints_newest_first(run: RunDir) -> None:
    put_adapter(run.adapter_dir)
    for step in (10, 20):
        put_checkpoint(run, step)
    source = run_source(run)
    assert source.recipe.model.id == "org/model"
    assert source.adapter_names == ("base", "adapter", "step-20", "step-10")
    assert source.adapters["step-10"] == str(run.checkpoints_dir / "step-10")
    assert choose_adapter(source) == "adapter"
    assert choose_adapter(source, base=True) == "base"
    assert choose_adapter(source, checkpoint=10) == "step-10"


def test_a_run_without_adapter_answers_with_its_newest_checkpoint(run: RunDir) -> None:
    for step in (10, 20):
        put_checkpoint(run, step)
    assert choose_adapter(run_source(run)) == "step-20"


def test_a_run_without_any_says_so(run: RunDir) -> None:
    with pytest.raises(UserError, match="No adapter"):
        choose_adapter(run_source(run))


def test_an_unknown_checkpoint_is_rejected_naming_the_known_ones(run: RunDir) -> None:
    put_checkpoint(run, 10)
    with pytest.raises(UserError, match="Available: 10"):
        choose_adapter(run_source(run), checkpoint=11)


def test_terms_sources_and_protocol_load_no_torch() -> None:
    code = (
        "import sys, qlora_tui.chat.chat_types, qlora_tui.chat.chat_sources, qlora_tui.engine.client;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


GIB = 1 << 30


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run of Qwen2.5-7B whose training needs much more memory than a chat."""
    files = SimpleNamespace(architecture=describe(config_of("Qwen__Qwen2.5-7B")))
    monkeypatch.setattr("qlora_tui.catalog.local_models.resolve_model", lambda model_id: files)
    return replace_setting(Recipe(model=Model(id="qwen")), "training.micro_batch_size", 64)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "too_little", "enough"), [("nf4", 5, 8), ("none", 14, 17)])
def test_the_chat_needs_its_model_and_not_the_runs_batch(
    recipe: Recipe, method: str, too_little: int, enough: int
) -> None:
    recipe = replace_setting(recipe, "quantization.method", method)
    needed = chat_bytes(recipe, Device())
    assert needed is not None and too_little * GIB < needed < enough * GIB


def test_the_memory_of_a_model_that_is_not_here_is_unknown() -> None:
    assert chat_bytes(Recipe(model=Model(id="org/none")), Device()) is None
