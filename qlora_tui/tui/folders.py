"""Opening a folder for the person at the terminal, who may have no desktop on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.subprocesses import user_env

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_OPENER = "xdg-open"


def open_folder(app: QloraApp, folder: Path) -> None:
    """Open a folder in the file manager; without a desktop, copy the command that goes there and show it."""
    if has_desktop() and _open(folder):
        app.notify(f"Opened {folder} in the file manager.")
    else:
        app.copy_to_clipboard(f"cd {shlex.quote(str(folder))}")


def has_desktop(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a window opened here would be on the user's own screen."""
    is_remote = "SSH_CONNECTION" in environment
    return not is_remote and any(environment.get(name) for name in ("WAYLAND_DISPLAY", "DISPLAY"))


def _open(folder: Path) -> bool:
    opener = shutil.which(_OPENER)
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
