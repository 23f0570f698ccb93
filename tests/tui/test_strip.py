from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.cells import cell_len

from qlora_tui.recipe.schema import Source
from qlora_tui.tui.render.charts import bar
from qlora_tui.tui.render.labels import recipe_line
from qlora_tui.tui.workbench import Workbench
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import config_folder, open_on


def test_the_line_says_what_the_recipe_is() -> None:
    workbench = Workbench()
    assert (
        recipe_line(workbench) == "balanced · no model · no data · r16 all-linear · 1,024 tok · batch 1 × 8"
    )
    workbench.set("model.id", "Qwen/Qwen2.5-7B")
    workbench.set("data.sources", (Source(path="a/tickets.jsonl"), Source(path="b.jsonl")))
    workbench.set("lora.target_modules", ("q_proj", "k_proj", "v_proj"))
    expected = "balanced* · Qwen2.5-7B · tickets.jsonl +1 · r16 3 targets · 1,024 tok · batch 1 × 8"
    assert recipe_line(workbench) == expected


def test_names_give_way_to_numbers_where_there_is_little_room() -> None:
    workbench = Workbench()
    workbench.set("model.id", "HuggingFaceTB/SmolLM2-135M-Instruct-converted")
    workbench.set("data.sources", (Source(path="a/lighthouse_keeper_conversations.jsonl"),))
    numbers = " · r16 all-linear · 1,024 tok × 1 × 8"
    for width in (78, 90, 118):
        line = recipe_line(workbench, width)
        assert len(line) <= width and line.endswith(numbers)
    assert "SmolLM2-135" in recipe_line(workbench, 78)
    assert recipe_line(workbench, 200) == recipe_line(workbench)
    workbench.set("data.sources", ())
    assert " · no data · " in recipe_line(workbench, 78)


@pytest.mark.parametrize("width", [60, 78, 79, 118])
def test_wide_characters_do_not_wrap_the_line(width: int) -> None:
    workbench = Workbench()
    workbench.set("data.sources", (Source(path="数据/中文对话训练数据集中文对话训练数据集中文对话.jsonl"),))
    line = recipe_line(workbench, width)
    assert cell_len(line) <= width
    assert width < 78 or line.endswith("1 × 8")


def test_custom_ranks_are_shown_as_a_range() -> None:
    workbench = Workbench()
    workbench.set("lora.rank_pattern", {"8-23.q_proj": 32, "down_proj": 8})
    assert " · r8-32 all-linear · " in recipe_line(workbench)


async def test_the_cost_follows_the_recipe_in_its_own_precision(private_home: Path) -> None:
    app = open_on("lora", model=str(config_folder(private_home, "Qwen__Qwen2.5-7B")))
    async with app.run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "NF4", "6.3 of 24.0 GiB fits", "fp16", "15.3 of 24.0 GiB fits")
        assert len(shown.splitlines()[2].rstrip()) <= 80
        app.edit("quantization.method", "int8")
        await wait_for_text(pilot, "int8", "of 24.0 GiB")
        app.edit("training.micro_batch_size", 64)
        await wait_for_text(pilot, "does not fit")


@pytest.mark.parametrize(
    ("width", "batch", "hint"),
    [(80, "1,024 tok × 1 × 8", "[u] Undo"), (120, "1,024 tok · batch 1 × 8", "[p] Presets  [u] Undo")],
)
async def test_the_strip_shows_the_undo_key(private_home: Path, width: int, batch: str, hint: str) -> None:
    app = open_on("lora", model=str(config_folder(private_home, "Qwen__Qwen2.5-7B")))
    async with app.run_test(size=(width, 24)) as pilot:
        shown = await wait_for_text(pilot, "of 24.0 GiB")
        line = shown.splitlines()[1]
        assert line.rstrip().endswith(hint)
        assert "Qwen2.5-7B" in line and batch in line


async def test_the_strip_says_why_there_is_no_estimate() -> None:
    async with open_on("lora").run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "The recipe has no model. Press [1] to select one.")
        await pilot.press("1")
        await wait_for_text(pilot, "The recipe has no model. Press Enter on one to select it.")


@pytest.mark.parametrize("part", [-1.0, 0.0, 0.01, 0.5, 0.99, 1.0, 7.0])
@pytest.mark.parametrize("width", [0, 1, 7, 40])
def test_a_bar_is_as_wide_as_asked(part: float, width: int) -> None:
    assert len(bar(part, width)) == width


async def test_a_model_without_weights_would_fit_but_cannot_train(private_home: Path) -> None:
    model = config_folder(private_home, "Qwen__Qwen2.5-7B", has_weights=False)
    app = open_on("lora", model=str(model))
    async with app.run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "✗ cannot train", "6.3 of 24.0 GiB")
        line = shown.splitlines()[2]
        assert line.count("would fit") == 2 and line.startswith(" ✗ cannot train  NF4 ")
        await pilot.press("3")
        await wait_for_text(pilot, "NF4 would fit", "✗ cannot train: this model has no")
        await pilot.press("0")
        await wait_for_text(pilot, "would fit  ✗ cannot train", "Get the model's weights")
        shutil.copy(config_folder(private_home, "Qwen__Qwen2.5-0.5B") / "model.safetensors", model)
        await pilot.press("1", "r", "4")
        await wait_for_text(pilot, "6.3 of 24.0 GiB fits")
