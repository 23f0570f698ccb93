"""Saves conversations as Markdown: in the run's folder, or beside the runs for a base model alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from qlora_tui import paths
from qlora_tui.chat.chat_types import Sampling
from qlora_tui.files import private_dir
from qlora_tui.runs.directory import RunDir
from qlora_tui.tui import clock


def transcript_path(run: RunDir | None) -> Path:
    """Today's transcript of a run's chats, or of those with a base alone or a run that was deleted since."""
    home = run.path if run is not None and run.path.exists() else paths.state_dir()
    folder = home / "chats"
    return folder / time.strftime("%Y%m%d.md", time.localtime(clock.now()))


def format_setting(value: float) -> str:
    """Format a setting in full, so that it can be typed again: a seed needs all its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def append_exchange(
    run: RunDir | None,
    prompt: str,
    answers: dict[str, str],
    sampling: Sampling,
    system_prompt: str = "",
    thoughts: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Append a prompt, its sampling and its answers to today's transcript. Returns its path; raises OSError.

    ``answers`` and ``thoughts`` are by adapter.
    """
    path = transcript_path(run)
    private_dir(path.parent)
    settings = ", ".join(
        f"{name} {format_setting(getattr(sampling, name))}"
        for name in sampling.__struct_fields__
        if getattr(sampling, name) is not None
    )
    lines = [f"## {time.strftime('%H:%M', time.localtime(clock.now()))}", "", f"*{settings}*", ""]
    if system_prompt:
        lines += ["**system**", "", system_prompt, ""]
    lines += [*(f"> {line}" for line in prompt.splitlines()), ""]
    for adapter_name, text in answers.items():
        lines += [f"**{adapter_name}**", ""]
        if thought := thoughts.get(adapter_name):
            lines += ["<details><summary>Thought</summary>", "", thought, "", "</details>", ""]
        lines += [text or "*no answer*", ""]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path
