"""Strings with terminal control sequences, for wherever foreign strings appear, and a check of output."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent

POISON = (
    "\x1b]52;c;Q0xJUA==\x07\x1b]2;TITLE\x1b\\\x1b]8;;http://evil.example\x1b\\\x1b[2J\x1b[666m\x9b2J\x9d2;T\x9c\x85"
    "\x00\x08\x0b\x0c\x7f\u202edrowssap\u2066\u2028\ufeff\u200b\U000e0041"
)
"""Clipboard, title, link, clearing, colors, the same as C1, overprinting, bidi, hidden characters."""
FOR_FILE_NAMES = POISON.replace("/", "").replace("\x00", "")[:60]
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufeff\u200b\U000e0000-\U000e007f\ud800-\udfff]"
)
_OURS = re.compile(
    # Moves, looks and modes, questions to the terminal, title pushed and popped, keypad and charset.
    r"\x1b\[(?!666)[0-9;]*[mHhlKGABCD]|\x1b\[[?<>=][0-9;]*\$?[hlupmc]|\x1b\[c|\x1b\[2[23];0t|\x1b[=>78]|\x1b\([0B]"
    r"|\x1b\]2;qlora-tui[^\x1b\x07]*\x07|\x1b\]22;[a-z-]+\x07|\x1b\[<?u|\x1b\[>[0-9;]*[uq]"
)


def raw(sent: bytes | str) -> list[str]:
    """Return control sequences in ``sent`` that this program does not send itself."""
    text = sent if isinstance(sent, str) else sent.decode("utf-8", "surrogateescape")
    rest = _OURS.sub("", text)
    return [rest[max(0, m.start() - 20) : m.end() + 20] for m in _UNSAFE.finditer(rest)]


def poisoned(value: Any) -> Any:
    """Return JSON with ``POISON`` appended to each string in it."""
    if isinstance(value, str):
        return value + POISON
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    if isinstance(value, dict):
        return {key: poisoned(part) for key, part in value.items()}
    return value


def poison_run(run: RunDir) -> None:
    """Put the poison into every string of a run's events, status, recipe, log and name that may hold any."""
    lines = []
    for line in run.events_path.read_text().splitlines():
        event: dict[str, Any] = json.loads(line)
        for key, value in event.items():
            candidate = {**event, key: poisoned(value)}
            try:
                msgspec.json.decode(json.dumps(candidate), type=AnyEvent)
            except msgspec.ValidationError:
                continue
            event = candidate
        lines.append(json.dumps(event))
    run.events_path.write_text("\n".join(lines) + "\n")
    status = json.loads(run.status_path.read_text())
    run.status_path.write_text(json.dumps({**status, "detail": poisoned(status.get("detail", "detail"))}))
    recipe = run.recipe_path.read_text()
    escaped = json.dumps(POISON)[1:-1].replace("\\udb40\\udc41", "\\U000e0041").replace("\x7f", "\\u007f")
    for setting in ("id", "path", "name"):
        recipe = re.sub(rf'^({setting} = "[^"]*)"', lambda m: f'{m[1]}{escaped}"', recipe, flags=re.MULTILINE)
    run.recipe_path.write_text(recipe)
    run.log_path.write_text(f"{POISON}\n" * 30)
    run.name_path.write_text("called" + POISON)
