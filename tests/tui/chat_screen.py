"""What tests of the Chat screen share: runs with adapters, and the result of an answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from qlora_tui.chat.chat_types import ADAPTER, GenerationResult
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.screens.chat.screen import ChatScreen
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_until

OUTCOME = GenerationResult(
    ending="turn end",
    text="It left **Oslo** on Monday:\n\n1. sorted\n2. on the road\n\nAnything else?",
    prompt_tokens=20,
    reused_tokens=0,
    new_tokens=34,
    first_token_s=0.41,
    tokens_per_s=27.3,
)


def with_adapters(run: RunDir, *adapter_names: str, copy_of: Path | None = None) -> RunDir:
    """Give a run its final adapter or checkpoints (``step-40``): hollow ones, or copies of a real one."""
    for adapter_name in adapter_names:
        folder = run.adapter_dir if adapter_name == ADAPTER else run.checkpoints_dir / adapter_name
        if copy_of is None:
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text("{}")
        else:
            shutil.copytree(copy_of, folder)
        (folder / "complete").touch()
    return run


def finished(*adapter_names: str) -> RunDir:
    return with_adapters(write_fake_run(FakeRun(state="finished", steps=1200, total=1200)), *adapter_names)


def chat_of(app: Any) -> ChatScreen:
    assert isinstance(app.screen, ChatScreen)
    return app.screen


async def rest(pilot: Pilot[Any], screen: ChatScreen) -> None:
    """Wait until no answer is being generated."""
    await pilot.pause()
    await wait_until(pilot, lambda: not screen.conversation.busy)
    await pilot.pause()
