"""Access to the terminal and desktop: clipboard, window title, notifications, folders.

The user's terminal may be on another machine. Escape sequences reach it over any link, but the terminal never
acknowledges them. Inside tmux they are wrapped, and tmux forwards them only if ``allow-passthrough`` is on. A
clipboard tool on this machine does report success, so it is tried as well.
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
"""Makes the terminal save its title; :data:`POP_TITLE` restores it."""
POP_TITLE = "\x1b[23;0t"
_TOOLS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TMUX", ("tmux", "load-buffer", "-w", "-")),
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")),
    ("", ("pbcopy",)),
)
"""(environment variable, command) of each clipboard tool. A command reads the text from stdin. It is tried
only if its variable is set; commands with the variable ``""`` are always tried.
"""
_TIMEOUT_S = 2.0
_SHOWN = 160
"""Maximum number of characters of the copied text that the notification quotes."""


def set_clipboard(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the escape sequence that copies ``text`` (OSC 52). Inside tmux, the result contains this
    sequence twice: plain, and wrapped for tmux. tmux may accept only one of the two.
    """
    osc = f"\x1b]52;c;{base64.b64encode(text.encode(errors='replace')).decode()}\a"
    return osc + _for_tmux(osc) if environment.get("TMUX") else osc


def set_title(text: str) -> str:
    """Return the escape sequence (OSC 2) that sets the window's title. tmux understands this sequence."""
    return f"\x1b]2;{_printable(text)}\a"


def notification_escape(text: str) -> str:
    """Return the escape sequence (OSC 9) for a desktop notification. Not every terminal supports it."""
    osc = f"\x1b]9;{_printable(text)}\a"
    return _for_tmux(osc) if os.environ.get("TMUX") else osc


def _for_tmux(sequence: str) -> str:
    return "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


async def copy(app: QloraApp, text: str) -> None:
    """Copy ``text`` with an escape sequence and, if possible, also with a clipboard tool. Notify the user
    which of these were used.
    """
    app.write_escape(set_clipboard(text))
    if tool := await asyncio.to_thread(copy_locally, text):
        title = f"Copied with {tool}, and sent to the terminal (OSC 52)"
    else:
        through = " through tmux" if os.environ.get("TMUX") else ""
        title = f"Sent to the terminal{through} (OSC 52), which not every terminal supports"
    app.notify(text if len(text) <= _SHOWN else text[:_SHOWN] + "…", title=title)


def copy_locally(text: str) -> str:
    """Pass the text to a clipboard tool on this machine.

    Return the name of the first tool that accepted the text; return an empty string if no tool did.
    """
    for variable, command in _TOOLS:
        if (variable and not os.environ.get(variable)) or not shutil.which(command[0]):
            continue
        try:
            # Some tools stay in the background to provide the text. They must not keep this app's output
            # open.
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
    """Open a folder in the file manager. If that is not possible, copy and show the ``cd`` command
    instead.
    """
    # Without a display, or over SSH, the file manager could not open a window on the user's own screen.
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
        # Start the file manager in its own session, so that it outlives the app.
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
    """Notify the user in the app that a run has ended. Also set the window title, send a desktop
    notification and ring the bell, each only if it is turned on in the settings.
    """
    wanted = app.settings.notify
    app.notify(notification.text, severity="information" if notification.event == "finished" else "error")
    if wanted.title:
        app.write_escape(set_title(notification.text))
    if wanted.desktop:
        app.write_escape(notification_escape(notification.text))
    if wanted.bell:
        app.bell()
