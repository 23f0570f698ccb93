"""A trainer that does not respond is said not to, on each screen that shows its run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora_tui.runs import liveness
from qlora_tui.tui.app import QloraApp
from tests.tui.played import Play, play
from tests.tui.seeing import shows

MakeApp = Callable[[], QloraApp]


@pytest.mark.parametrize("mode", ["train", "runs"])
async def test_a_silent_trainer_is_said_not_to_respond(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(liveness, "SILENT_S", 30.0)
    play(Play(name="tickets", state="running", steps=60, total=300))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await app.switch_mode(mode)
        await shows(pilot, "Not responding")
