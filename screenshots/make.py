"""Draws the pictures of the README again: ``make screenshots``.

The run is a real one of ``qlora-tui demo`` (``tests/tui/recordings``), as its trainer wrote it. It is laid
into a home of its own and shown by the app itself; nothing is drawn by hand. The data shown are the demo's,
through the demo's tokenizer, so the demo's model must have been fetched (``make demo`` does).
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from textual.pilot import Pilot

HERE = Path(__file__).parent
WATCHED_SHARE = 0.87
"""How much of the recorded run the picture of the live screen shows."""
QWEN = HERE.parent / "tests" / "configs" / "Qwen__Qwen2.5-7B.json"
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Picture:
    """One file: a screen, a size, and what is done before it is taken."""

    name: str
    mode: str
    size: tuple[int, int] = (120, 40)
    keys: tuple[str, ...] = ()
    shows: str = ""
    """Text to wait for."""


PICTURES = (
    Picture("home-120x40", "home", shows="Next"),
    Picture("data-120x40", "data", shows="Keeper's log"),
    Picture("memory-120x40", "memory", shows="fits up to"),
    Picture("lora-120x40", "lora", shows="q_proj"),
    Picture("train-120x40", "train", shows="validation"),
    Picture("train-80x24", "train", size=(80, 24), shows="step"),
    Picture("runs-120x40", "runs", shows="demo"),
)


def main() -> int:
    """Draw every picture into this folder."""
    from qlora_tui.demo.model import ensure_model

    model = ensure_model(lambda words: print(words, file=sys.stderr))
    with tempfile.TemporaryDirectory() as home:
        for kind in ("CONFIG", "STATE", "CACHE"):
            os.environ[f"XDG_{kind}_HOME"] = f"{home}/{kind.lower()}"
        os.environ["HF_HOME"] = f"{home}/huggingface"
        qwen = Path(home) / "Qwen2.5-7B"
        qwen.mkdir()
        shutil.copy(QWEN, qwen / "config.json")
        lay_out_run()
        for picture in PICTURES:
            asyncio.run(draw(picture, model=model, estimated=qwen))
            print(picture.name)
    return 0


def lay_out_run() -> None:
    """Put the recorded run in place, cut off while it is still in training."""
    from qlora_tui.runs.process import mark
    from tests.tui.recorded import STEPS, recorded_until

    run, at = recorded_until(round(STEPS * WATCHED_SHARE), process=mark())
    # The run is shown as if it were now: its clock is moved, nothing else.
    for path in (run.events_path, run.telemetry_path, run.status_path):
        shift_clock(path, time.time() - at)


def shift_clock(path: Path, by: float) -> None:
    """Add ``by`` seconds to every line's ``at``."""
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        entry["at"] += by
        if isinstance(entry.get("gpu"), dict):
            entry["gpu"]["at"] += by
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")


async def draw(picture: Picture, *, model: Path, estimated: Path) -> None:
    """Take one picture."""
    from qlora_tui.demo.conversations import CONVERSATIONS
    from qlora_tui.recipe.layering import build_recipe
    from qlora_tui.settings import Settings
    from qlora_tui.tui.app import QloraApp

    app = QloraApp(Settings(model_folders=(str(model.parent),), gpu_memory_gib=24.0))
    chosen = model if picture.mode == "data" else estimated
    app.workbench.replace(build_recipe(preset="balanced", model=str(chosen), data=[str(CONVERSATIONS)]))
    async with app.run_test(size=picture.size) as pilot:
        if picture.mode != "home":
            await app.switch_mode(picture.mode)
        await until(pilot, lambda: picture.shows in plain(app.export_screenshot()), picture)
        for key in picture.keys:
            await pilot.press(key)
        await pilot.pause(1.5)
        (HERE / f"{picture.name}.svg").write_text(app.export_screenshot(title="qlora-tui"))


async def until(pilot: Pilot[None], what: Callable[[], bool], picture: Picture) -> None:
    """Let the app go on until ``what`` is true."""
    deadline = time.monotonic() + _PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{picture.name}: {picture.shows!r} did not appear")
        await pilot.pause(0.2)


def plain(svg: str) -> str:
    """The text of a picture."""
    return html.unescape("".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))).replace("\xa0", " ")


if __name__ == "__main__":
    sys.exit(main())
