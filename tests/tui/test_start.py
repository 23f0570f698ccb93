"""What comes before the first frame, and what does not have to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from textual.css import stylesheet
from textual.css.parse import parse

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.tui.app import QloraApp
from tests.tui.screen_assertions import wait_for_text
from tests.tui.terminal_emulator import see

APP = [sys.executable, "-m", "qlora_tui"]
LATER = ("qlora_tui.recipe", "qlora_tui.catalog", "qlora_tui.memory", "qlora_tui.runs", "psutil", "pynvml")
UNTIL_SHOWN = """
import asyncio, gc, sys
gc.disable()  # as the command line does
from qlora_tui.tui import process
from qlora_tui.tui.app import QloraApp

async def main():
    app = QloraApp()
    set_, loaded = app.shown.set, []
    app.shown.set = lambda: (loaded.extend(sys.modules), set_())
    async with app.run_test() as pilot:
        await app.shown.wait()
        frozen = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        process.freeze_objects()
        assert gc.isenabled() and 0 < frozen < gc.get_freeze_count() - 900
    print(*loaded)

asyncio.run(main())
"""


def test_the_first_frame_waits_only_for_what_it_shows() -> None:
    done = subprocess.run([sys.executable, "-c", UNTIL_SHOWN], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "qlora_tui.tui.screens.home.screen" in loaded
    assert not [name for name in loaded if name.startswith(LATER)]


def test_the_first_frame_is_whole_and_painted_once() -> None:
    with Terminal(APP) as terminal:
        see(terminal, "Train", "Next", "Help")
        painted = bytes(terminal.painted)
    assert painted.count(b"5 Train") == 1
    # Every line has the screen's own background, also where nothing stands.
    assert painted[: painted.index(b"Help")].count(b" " * 40) >= 15


async def test_a_stylesheet_is_parsed_once_for_all_screens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []

    def counted(scope: str, css: str, read_from: Any, **more: Any) -> object:
        read.append(f"{read_from} {more['tie_breaker']}")
        return parse(scope, css, read_from, **more)

    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Next")
        monkeypatch.setattr(stylesheet, "parse", counted)
        for key, text in (("5", "Not ready"), ("?", "Help: Train"), ("q", "Not ready"), ("6", "Compare")):
            await pilot.press(key)
            await wait_for_text(pilot, text)
    assert any("train.tcss" in one for one in read)
    assert not any("app.tcss" in one for one in read)
    assert len(read) == len(set(read))


async def test_a_draft_is_there_for_whoever_asks_first(private_home: Path) -> None:
    (paths.state_dir() / "draft.toml").write_text('# began as paper\n[model]\nid = "org/model"\n')
    async with QloraApp().run_test(size=(120, 40)) as pilot:
        await pilot.press("3")
        await wait_for_text(pilot, "paper", "no data")
