"""System prompts used before, so that they need not be typed again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.decoding import decode_json
from qlora_tui.files import atomic_write

_MAX_PROMPTS = 20
_PROMPTS = msgspec.json.Decoder(list[str])


def load_system_prompts() -> list[str]:
    """Return the last ones, the newest first."""
    try:
        return decode_json(_file().read_bytes(), _PROMPTS)
    except (OSError, msgspec.MsgspecError):
        return []


def remember_system_prompt(text: str) -> None:
    """Put one in front, where the disk allows it: nothing depends on it."""
    if text:
        others = [known for known in load_system_prompts() if known != text]
        with suppress(OSError):
            atomic_write(_file(), msgspec.json.encode([text, *others][:_MAX_PROMPTS]))


def _file() -> Path:
    return paths.state_dir() / "system-prompts.json"
