"""The Data screen on files of a test."""

from __future__ import annotations

from typing import Any

from textual.pilot import Pilot

from qlora_tui.recipe.schema import Source
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.data.screen import DataScreen
from tests.tui.workstation import open_on, settle


def data_app(model: str, *sources: str | Source, **settings: object) -> QloraApp:
    app = open_on("data", model=model)
    given = tuple(Source(path=s) if isinstance(s, str) else s for s in sources)
    app.workbench.set("data.sources", given)
    for key, value in settings.items():
        app.workbench.set(f"data.{key}", value)
    return app


def screen_of(app: Any) -> DataScreen:
    assert isinstance(app.screen, DataScreen)
    return app.screen


async def whole(pilot: Pilot[Any]) -> None:
    """Until every row has been read, and what follows from it is shown."""
    await settle(pilot)
    await settle(pilot)
