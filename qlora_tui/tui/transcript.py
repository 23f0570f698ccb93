"""Keeping what was said in a chat, as Markdown in the run's directory."""

from __future__ import annotations

import time
from pathlib import Path

from qlora_tui.files import private_dir
from qlora_tui.runs.directory import RunDir


def append_exchange(run: RunDir, prompt: str, answers: dict[str, str]) -> Path:
    """Add a prompt and its answers to today's transcript; its path."""
    path = private_dir(run.path / "chats") / time.strftime("%Y%m%d.md")
    lines = [f"## {time.strftime('%H:%M')}", "", *(f"> {line}" for line in prompt.splitlines()), ""]
    for voice, text in answers.items():
        lines += [f"**{voice}**", "", text, ""]
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")
    return path
