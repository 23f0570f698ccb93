"""The form with the settings of the recipe, and the checks before a launch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import all_runs
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.step_probe import StepProbe
from qlora_tui.runs.suggested_fix import SuggestedFix
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train import screen as train_module
from qlora_tui.tui.widgets.settings_form import SettingsForm
from qlora_tui.worker import JobStopped, Progress
from tests.tui.sample_data import readable_model
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import open_on, settle


async def test_the_form_edits_the_recipe_checks_what_is_typed_and_launches_nothing_without_a_model() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "✗ error", "No model selected.", "Cannot train: no model, no data")
        # The key that corrects the error is with the conclusion, and is not repeated with the check.
        fixes = [
            line.partition("▸ ")[2].split("  ")[0] for line in text_of(app).splitlines() if "▸ [1]" in line
        ]
        assert len(fixes) == 1, fixes
        await pilot.press("t")
        await wait_for_text(pilot, "Not ready to run")
        assert all_runs() == []
        await pilot.press("escape")

        await wait_for_text(pilot, "Gradient acc", "Passes over the data")
        await pilot.press("j", "j", "j")
        await wait_for_text(pilot, "Forward passes per optimizer step", "The same at any value")
        await pilot.press("l")
        training = app.workbench.recipe.training
        assert training.gradient_accumulation == 16
        await wait_for_text(pilot, "preset: 8", "= 16 sequences")
        await pilot.press("backspace")
        assert app.workbench.recipe.training.gradient_accumulation == 8
        await pilot.press("enter", "ctrl+u", *"many", "enter")
        typed = app.screen.query_one("SettingsForm > Input").region
        await wait_for_text(pilot, "✗", "a whole number from 1 to 65,536")
        # What is typed is in the row of the setting, over its value.
        row = text_of(app).splitlines()[typed.y]
        assert "Gradient accumulation" in row and row.index("many") == typed.x
        await pilot.press("escape", "l", "h")
        assert app.workbench.recipe.training.gradient_accumulation == 8
        await pilot.press("enter", "ctrl+u", *"6", "enter")
        await pilot.pause()
        assert app.workbench.recipe.training.gradient_accumulation == 6
        await pilot.press("u")
        assert app.workbench.recipe.training.gradient_accumulation == 8


async def test_groups_fold_and_what_was_changed_stays_in_view() -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        # The first groups are open, as many as fit, with an empty row above each group.
        lines = (
            await wait_for_text(pilot, "− Run", "+ Evaluation", "+ LoRA", "+ Data", "+ Model")
        ).splitlines()
        above = next(lines[row - 1] for row, line in enumerate(lines) if "+ LoRA" in line)
        assert not above[:50].strip("│ ")
        assert "rsLoRA" not in text_of(app) and "Preference data" not in text_of(app)
        # A 0 is shown as what it means. The setting under the cursor is explained, then others.
        await wait_for_text(pilot, "Max steps", "no limit", "Passes over the data", "Peak rate")
        list_ = app.screen.query_one(SettingsForm).list
        while list_.field is not None or list_.group.title != "LoRA":
            await pilot.press("j")
        await wait_for_text(pilot, "Settings: LoRA", "Dropout on the adapter's input.")
        await pilot.press("enter")
        await wait_for_text(pilot, "− LoRA", "Dropout", "rsLoRA")
        await pilot.press("j", "j", "l")
        assert app.workbench.recipe.lora.dropout > 0
        await pilot.press("k", "k", "h")
        await wait_for_text(pilot, "+ LoRA", "preset: 0")
        await pilot.press("k")
        await wait_until(pilot, lambda: "rsLoRA" not in text_of(app))
        app.edit("data.preferences", "dpo")
        await wait_for_text(pilot, "Preferences", "Preference data", "preset: refuse")


async def test_a_wide_form_has_two_columns_with_every_group_open() -> None:
    app = QloraApp()
    async with app.run_test(size=(200, 60)) as pilot:
        await pilot.press("5")
        lines = (
            await wait_for_text(pilot, "− Run", "Kernels", "Max grad norm", "Train embeddings")
        ).splitlines()
        row, line = next((row, line) for row, line in enumerate(lines) if "Max grad norm" in line)
        await pilot.click(offset=(line.index("Max grad"), row))
        list_ = app.screen.query_one(SettingsForm).list
        assert list_.field is not None and list_.field.path == "training.max_grad_norm"
        await pilot.press("enter", "ctrl+u", *"2.5")
        typed = app.screen.query_one("SettingsForm > Input").region
        assert typed.offset == (line.index("1", line.index("Max grad")), row)
        await pilot.press("enter", "j")
        await wait_for_text(pilot, "● Max grad norm", "2.5  preset: 1")


async def test_every_setting_of_the_form_can_be_stepped_both_ways() -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        list_ = app.screen.query_one(SettingsForm).list
        seen = set()
        line = -1
        while list_.cursor != line:
            line = list_.cursor
            if list_.field is None:
                await pilot.press("l")
            elif list_.field.kind in ("int", "float", "bool", "choice"):
                await pilot.press("l", "h")
            seen.add(list_.field and list_.field.path)
            await pilot.press("j")
        named = set(fields()) - {"data.sources", "note"}
        assert seen - {None} == named - {
            "data.preferences",
            "training.preference_beta",
            "training.simpo_gamma",
        }
        assert len(app.screen_stack) == 1


def app_with_checks(monkeypatch: pytest.MonkeyPatch, model: Path, *checks: Check) -> QloraApp:
    """An app whose recipe has a model and data, with this outcome of its checks; no run is started, and no
    samples are counted.
    """
    monkeypatch.setattr(QloraApp, "count_samples", lambda app: None)
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    monkeypatch.setattr(train_module, "preflight", lambda *_, **__: checks)
    app = QloraApp()
    app.workbench.replace(
        Recipe(model=Model(id=str(model)), data=Data(sources=(Source(path="tickets.jsonl"),)))
    )
    return app


async def test_a_recipe_that_is_ready_is_queued_and_then_watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = [Check(kind, "ok", "there") for kind in (CheckKind.MODEL, CheckKind.DATA)]
    app = app_with_checks(monkeypatch, tmp_path, *fine)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "✓ Ready.", "[t] launch it")
        await pilot.press("t")
        await wait_for_text(pilot, "queued", "waiting in the queue")
        assert len(run_queue.waiting()) == 1


async def test_the_verdict_says_queue_where_a_launch_would_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits = Check(CheckKind.QUEUE, "note", "Another run trains.")
    app = app_with_checks(monkeypatch, tmp_path, Check(CheckKind.MODEL, "ok", "there"), waits)
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        text = await wait_for_text(pilot, "[t] queue it")
        # A key is named once, in its panel or in the footer.
        assert text.casefold().count("check again") == 1 and "t Queue" not in text


async def test_a_recipe_edited_during_its_checks_is_launched_as_it_was_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = Check(CheckKind.MODEL, "ok", "there")
    app = app_with_checks(monkeypatch, tmp_path, fine)
    checked = app.workbench.recipe
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "✓ Ready.", "[t] launch it")
        await settle(pilot)  # the checks are made once more, with an exact estimate

        def edited(*_: object) -> tuple[Check, ...]:
            app.workbench.set("lora.rank", 256)
            return (fine,)

        monkeypatch.setattr(train_module, "preflight", edited)
        await pilot.press("t")
        await wait_until(pilot, lambda: all_runs())
        assert all_runs()[0].recipe().lora.rank == checked.lora.rank


async def test_a_failed_check_is_confirmed_before_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    doubt = Check(CheckKind.MEMORY, "error", "does not fit: 30.0 of 24.0 GiB.")
    app = app_with_checks(monkeypatch, tmp_path, doubt)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "t Launch anyway")
        await pilot.press("t")
        await wait_for_text(pilot, "Launch anyway?", "30.0 of 24.0 GiB")
        await pilot.press("n")
        await pilot.pause()
        assert all_runs() == []


async def test_the_fix_key_resolves_the_first_check_with_a_fix(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("fox " * 3000 + "\n\nshort\n")
    app = QloraApp()
    app.workbench.replace(Recipe(data=Data(sources=(Source(path=str(book)),), max_length=64)))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "[m] split into about 47 rows")
        await pilot.press("m")
        await wait_for_text(pilot, "Split into about 47 rows. Press [u] to undo.", "checks ok  data")
        assert app.workbench.recipe.data.overflow == "split"


async def test_the_fix_of_a_run_with_too_few_steps_comes_before_its_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fix = SuggestedFix("set Gradient accumulation to 1", changes={"training.gradient_accumulation": 1})
    few = Check(CheckKind.SETTINGS, "warning", "The run has only 6 steps.", suggested_fix=fix)
    app = app_with_checks(monkeypatch, tmp_path, few)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        text = await wait_for_text(pilot, "▸ [m] set Gradient accumulation to 1", "! 1 warning")
        assert text.index("[m]") < text.index("[t] launch anyway")
        await pilot.press("m")
        await wait_until(pilot, lambda: app.workbench.recipe.training.gradient_accumulation == 1)


async def test_a_row_that_blocks_a_run_is_reported_before_launch(tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 2 + "{bad\n")
    app = QloraApp()
    model = readable_model(tmp_path)
    app.workbench.replace(
        Recipe(model=Model(id=model), data=Data(sources=(Source(path=str(rows)),), packing=False))
    )
    async with app.run_test(size=(80, 60)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "Cannot train: not valid JSON")
        # The path before it decides where its lines break.
        await wait_until(pilot, lambda: "Line 3 is not valid JSON" in " ".join(text_of(app).split()))
        await wait_until(pilot, lambda: "leave bad rows out" in " ".join(text_of(app).split()))
        await pilot.press("t")
        await wait_for_text(pilot, "Not valid JSON")
        await pilot.pause()
        assert all_runs() == []
        await pilot.press("escape")
        rows.write_text('{"instruction": "a", "output": "b"}\n' * 200)
        await pilot.press("f5")
        await wait_until(pilot, lambda: "Line 3" not in text_of(app))
        await wait_for_text(pilot, "checks ok  model, data")
        rows.write_text("{bad\n")
        await pilot.press("6", "5")
        await wait_for_text(pilot, "Cannot train: not valid JSON")


@pytest.mark.usefixtures("same_machine")
async def test_the_checks_ignore_an_assumed_gpu(private_home: Path) -> None:
    app = open_on("train", model=readable_model(private_home), gpu_gib=12)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await wait_for_text(pilot, "checks ok  model, memory", "No GPU: runs train on the CPU")
        # The run's memory comes first, then the figure of the other screens.
        assert re.search(r"fit: .* of 32\.0 GiB \(this CPU\).*\n.*fit: .* of 12\.0 GiB \(assumed GPU\)", text)
        await pilot.press("v")
        await wait_for_text(pilot, "would fit: uses ~1.3 of 32.0 GiB (this")
        for columns in (100, 80, 60):
            await pilot.resize_terminal(columns, 40)
            await wait_for_text(pilot, "GiB (this CPU)", "GiB (assumed GPU)")


async def test_a_key_measures_three_steps_until_it_is_pressed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, private_home: Path
) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 40)
    ready = Event()

    def probe(recipe: Recipe, say: Any, should_stop: Callable[[], bool]) -> StepProbe:
        say(Progress(1, 3, "training"))
        while not ready.wait(0.01):
            if should_stop():
                raise JobStopped
        return StepProbe(steps=3, seconds=6.0, tokens=300, peak_bytes=1 << 30)

    monkeypatch.setattr(train_module, "probe_steps", probe)
    app = open_on("train", model=readable_model(private_home))
    app.workbench.set("data.sources", (Source(path=str(rows)),))
    async with app.run_test(size=(160, 40)) as pilot:
        await wait_for_text(pilot, "[b] trains three steps to measure the time", "· note    time")
        for end in ("b", ""):
            await pilot.press("b")
            await wait_for_text(pilot, "measuring three steps: training step 1 of 3", "[b] stop")
            await pilot.press(*filter(None, [end]))
            ready.set() if not end else None
            await wait_until(pilot, lambda: "measuring" not in text_of(app))
        await wait_for_text(pilot, "measured in three steps: 2 s per step, peak 1.0 GiB", "on this machine")
        app.edit("lora.rank", 8)
        await wait_until(pilot, lambda: "measured in three steps" not in text_of(app))
