"""The Data screen says what becomes of reasoning, and its keys change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_tui.recipe.schema import Source
from tests.data.thinkers import SMOLLM3
from tests.tui.sample_data import readable_model, write_rows
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import open_on


def thinking_model(home: Path) -> str:
    """A model whose template can think, or not."""
    folder = Path(readable_model(home))
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": SMOLLM3}))
    return str(folder)


def rows(path: Path) -> Path:
    """Three answers, one of them with reasoning."""
    said = ("a small dog", "<think>\nI count.\n</think>\n\n51", "rain")
    return write_rows(
        path,
        [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}]}
            for n, text in enumerate(said)
        ],
    )


async def test_keys_change_the_reasoning_setting_and_the_screen_shows_it(tmp_path: Path) -> None:
    app = open_on("data", model=thinking_model(tmp_path))
    app.workbench.set("data.sources", (Source(path=str(rows(tmp_path / "rows.jsonl"))),))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, to learn", "Thinking: on for the 1")
        await pilot.press("R")
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, only read")
        await pilot.press("r")
        await wait_for_text(pilot, "Thinking: on for every row")
        await pilot.press("r")
        await wait_for_text(pilot, "Reasoning: 1 of 3 rows, left out", "Thinking: off for every row")
        data = app.workbench.recipe.data
        assert (data.thinking, data.reasoning_in_loss) == ("off", False)
