from __future__ import annotations

import shutil
from pathlib import Path

from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import config_folder, open_on


async def test_the_cost_follows_the_recipe_in_its_own_precision(private_home: Path) -> None:
    app = open_on("lora", model=str(config_folder(private_home, "Qwen__Qwen2.5-7B")))
    async with app.run_test(size=(80, 24)) as pilot:
        shown = await wait_for_text(pilot, "NF4", "6.3 of 24.0 GiB fits", "fp16", "15.3 of 24.0 GiB fits")
        assert len(shown.splitlines()[2].rstrip()) <= 80
        app.edit("quantization.method", "int8")
        await wait_for_text(pilot, "int8", "of 24.0 GiB")
        app.edit("training.micro_batch_size", 64)
        await wait_for_text(pilot, "does not fit")


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
