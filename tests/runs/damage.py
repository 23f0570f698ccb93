"""Runs with one damaged file, for the tests of everything that reads runs."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

from qlora_tui.checksums import write_checksums
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import telemetry
from qlora_tui.runs.damage import MARKER
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Finished, Started, encode
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.status import State, Status, write_status
from qlora_tui.runs.telemetry import Reading
from tests.support.step_events import a_step

GONE = ProcessIdentity(pid=1, boot_id="another boot")
DEEP = b"[" * 100_000
FILES = (
    "status.json",
    "events.jsonl",
    "telemetry.jsonl",
    "name",
    "recipe.toml",
    "trainer.log",
    "control/1.json",
    "checkpoints/step-2/complete",
    "checkpoints/step-2/state.json",
)
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bad UTF-8": lambda content: content.replace(b"e", b"\xff"),
    "one bad byte": lambda content: content.replace(b"tickets", b"ticket\xff").replace(b"done", b"don\xff"),
    "deep nesting": lambda content: DEEP + b"\n" + content,
    "deep in a field": lambda content: content.replace(b'"at":', b'"at":' + DEEP, 1),
    "an absurd time": lambda content: content.replace(b'"at":', b'"at":1e300,"x":'),
    "a huge number": lambda content: content.replace(b'"step":', b'"step":1' + b"0" * 400 + b',"x":'),
    "negative numbers": lambda content: content.replace(b'"at":', b'"at":-').replace(b'"step":', b'"step":-'),
    "nothing": lambda content: b"",
}
REPLACED: dict[str, Callable[[Path], None]] = {"a pipe": os.mkfifo, "a folder": Path.mkdir}
WAYS = (*DAMAGE, *REPLACED)
"""Each way in which a file is damaged, or something else is in its place."""


def a_run(recipe: Recipe, state: State) -> RunDir:
    run = create_run(recipe)
    lines = [
        encode(Started(at=1.0, attempt=1, pid=1)),
        encode(a_step(at=2.0)),
    ]
    if state == "finished":
        lines.append(encode(Finished(at=3.0, step=2, seconds=1.0, tokens_per_s=1.0, reason="all steps done")))
    with run.events_path.open("ab") as events:
        events.write(b"".join(lines))
    run.telemetry_path.write_bytes(telemetry.encode(Reading(at=2.0, rss_bytes=1, cpu_percent=1.0)))
    run.name_path.write_text("tickets again\n")
    run.log_path.write_text("a line\n")
    (run.control_dir / "1.json").write_bytes(b'{"kind":"checkpoint","value":1}')
    folder = run.checkpoints_dir / "step-2"
    folder.mkdir()
    (folder / "complete").write_bytes(b'{"state.json":1}')
    (folder / "state.json").write_bytes(b"{}")
    write_status(
        run, Status(state=state, at=2.0, process=None if state == "finished" else GONE, detail="done", step=2)
    )
    return run


def damaged(recipe: Recipe, state: State, file: str, how: str) -> RunDir:
    run = a_run(recipe, state)
    path = run.path / file
    if how in REPLACED:
        path.unlink()
        REPLACED[how](path)
    else:
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    return run


def put_adapter(folder: Path) -> Path:
    """A small adapter in the formats that peft writes, with checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(range(64))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_checksums(folder)
    return folder


def put_checkpoint(folder: Path) -> Path:
    """Write a checkpoint."""
    put_adapter(folder)
    with zipfile.ZipFile(folder / "optimizer.pt", "w") as archive:
        archive.writestr("optimizer/data/0", bytes(4096))
    write_checksums(folder)
    (folder / MARKER).write_text(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))
    return folder
