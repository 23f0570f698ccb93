"""What a terminal and a desktop do besides showing text: clipboard, window title, notifications, folders.

The person may be far from this machine. Escape sequences pass any link, but the terminal never answers them.
Inside tmux they are wrapped, and tmux passes them on if its ``allow-passthrough`` is on; a local tool reports
whether it worked, so it is tried as well.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.worker import user_env

if TYPE_CHECKING:
    from qlora_tui.runs.notify import RunNotification
    from qlora_tui.tui.app import QloraApp


PUSH_TITLE = "\x1b[22;0t"
"""Have the terminal remember its title; :data:`POP_TITLE` brings it back."""
POP_TITLE = "\x1b[23;0t"
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


def set_clipboard(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return OSC 52; inside tmux a second time, wrapped, since either may be what is allowed there."""
    osc = f"\x1b]52;c;{base64.b64encode(text.encode(errors='replace')).decode()}\a"
    return osc + _for_tmux(osc) if environment.get("TMUX") else osc


def set_title(text: str) -> str:
    """Return OSC 2, which tmux knows."""
    return f"\x1b]2;{_printable(text)}\a"


def notification_escape(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return OSC 9: a desktop notification, if the terminal has them."""
    osc = f"\x1b]9;{_printable(text)}\a"
    return _for_tmux(osc) if environment.get("TMUX") else osc


def _for_tmux(sequence: str) -> str:
    return "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


async def copy(app: QloraApp, text: str) -> None:
    """Copy in every way there is, and notify which one worked."""
    app.write_escape(set_clipboard(text))
    if tool := await asyncio.to_thread(copy_locally, text):
        title = f"Copied with {tool}, and sent to the terminal (OSC 52)"
    else:
        through = " through tmux" if os.environ.get("TMUX") else ""
        title = f"Sent to the terminal{through} (OSC 52). Not every terminal supports it"
    app.notify(text if len(text) <= _SHOWN else text[:_SHOWN] + "…", title=title)


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


def open_folder(app: QloraApp, folder: Path) -> None:
    """Open a folder in the file manager; without a desktop, copy the command that goes there and show it."""
    # Otherwise a window would not open on the user's own screen.
    has_screen = any(os.environ.get(name) for name in ("WAYLAND_DISPLAY", "DISPLAY"))
    if has_screen and "SSH_CONNECTION" not in os.environ and _open(folder):
        app.notify(f"Opened {folder} in the file manager.")
    else:
        app.copy_to_clipboard(f"cd {shlex.quote(str(folder))}")


def _open(folder: Path) -> bool:
    opener = shutil.which("xdg-open")
    if opener is None:
        return False
    try:
        # In its own session, so that the file manager stays when the app ends.
        subprocess.Popen(
            [opener, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=user_env(),
        )
    except OSError:
        return False
    return True


def notify_run_ended(app: QloraApp, notification: RunNotification) -> None:
    """Notify in the app, and by bell, title and desktop notification if the settings want them."""
    wanted = app.settings.notify
    app.notify(notification.text, severity="information" if notification.event == "finished" else "error")
    if wanted.title:
        app.write_escape(set_title(notification.text))
    if wanted.desktop:
        app.write_escape(notification_escape(notification.text))
    if wanted.bell:
        app.bell()
