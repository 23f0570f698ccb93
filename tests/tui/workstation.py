"""The app opened on one screen, with a real model's config and a GPU of a given size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from qlora_tui.catalog.described import describe
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.settings import Settings
from qlora_tui.tui import app as app_module
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.screens.runs.screen import RunsScreen
from qlora_tui.tui.workbench import Workbench
from tests.data.families import tokenizer_json
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until

CONFIGS = Path(__file__).parents[1] / "configs"


def config_folder(home: Path, published: str, *, has_weights: bool = True) -> Path:
    """A folder with a published model's config, enough for every estimate, and a file without tensors; its
    tokenizer is of another model.

    Its architecture was read before: otherwise a test would see the outline, or what follows it.
    """
    folder = home / "models" / published.rpartition("__")[2]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CONFIGS / f"{published}.json", folder / "config.json")
    if has_weights:
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (folder / "tokenizer.json").write_text(tokenizer_json())
    describe(config_of(published))
    return folder


def config_of(published: str) -> dict[str, Any]:
    """The config itself."""
    content: dict[str, Any] = json.loads((CONFIGS / f"{published}.json").read_text())
    return content


def open_on(mode: str, *, model: str = "", gpu_gib: float = 24.0, **settings: Any) -> QloraApp:
    """An app that shows ``mode`` first, its draft on this model."""
    workbench = Workbench()
    if model:
        workbench.replace(replace_setting(workbench.recipe, "model.id", model))
    Draft().save(workbench, replace=True)
    return _first_shown(mode)(Settings(gpu_memory_gib=gpu_gib, **settings))


def _first_shown(mode: str) -> type[QloraApp]:
    # Textual looks for a style sheet beside the class's own file.
    styles = Path(app_module.__file__).with_name("app.tcss")
    return type("OpenedOn", (QloraApp,), {"DEFAULT_MODE": mode, "CSS_PATH": styles})


async def go_to(pilot: Pilot[Any], key: str, text: str) -> None:
    """For pictures: the app is opened on Home and goes to the screen of this key, where this is to be read.

    From Python 3.12 on, Textual (8.2) mounts the widgets of an app's very first screen before that screen
    is on its stack, which a screen with a field in it does not stand.
    """
    await pilot.press(key)
    await wait_for_text(pilot, text)
    await settle(pilot)


async def settle(pilot: Pilot[Any]) -> None:
    """Let the app run until no worker is left and the screen stays as it is.

    A worker may be started by a timer, or by what another one found.
    """
    before = ""

    def is_still() -> bool:
        nonlocal before
        before, last = text_of(pilot.app), before
        return before == last and all(worker.is_finished for worker in pilot.app.workers)

    await pilot.pause()
    await wait_until(pilot, is_still)
    await pilot.pause()


async def open_runs(app: QloraApp) -> RunsScreen:
    await app.switch_mode("runs")
    assert isinstance(app.screen, RunsScreen)
    return app.screen
