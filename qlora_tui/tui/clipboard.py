"""Copying to the clipboard of the person at the terminal, which may be far from this machine.

OSC 52 asks the terminal itself, over any link; it never answers. Inside tmux the request is sent a second
time, wrapped so that tmux passes it on. A local tool reports whether it worked, so it is tried as well.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_tui.tui import escapes

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TMUX", ("tmux", "load-buffer", "-w", "-")),
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
)
"""The variable without which a tool has nowhere to copy to, and its command; the text goes to its stdin."""
_TIMEOUT_S = 2.0
_SHOWN = 160
"""Characters of the copied text that the notification repeats."""


async def copy(app: QloraApp, text: str) -> None:
    """Copy by every way there is, and say which worked."""
    app.write_escape(escapes.set_clipboard(text))
    tool = await asyncio.to_thread(copy_locally, text)
    app.notify(text if len(text) <= _SHOWN else text[:_SHOWN] + "…", title=result_text(tool))


def copy_locally(text: str) -> str:
    """Give the text to the tools that are here; the name of the first that took it, or nothing."""
    for variable, command in _TOOLS:
        if (variable and not os.environ.get(variable)) or not shutil.which(command[0]):
            continue
        try:
            # Some stay in the background to serve the text: they must not keep our output open.
            done = subprocess.run(
                command,
                input=text.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return command[0]
    return ""


def result_text(tool: str, environment: Mapping[str, str] = os.environ) -> str:
    """Describes what was done: which tool copied it, or that only the terminal was asked to."""
    if tool:
        return f"Copied with {tool}, and sent to the terminal (OSC 52)"
    through = " through tmux" if environment.get("TMUX") else ""
    return f"Sent to the terminal{through} (OSC 52). Not every terminal supports it"
