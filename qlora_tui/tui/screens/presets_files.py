"""Preset files that come, go, and are edited: import, export, ``$EDITOR``."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from qlora_tui.errors import Problem
from qlora_tui.files import atomic_write
from qlora_tui.recipe import toml
from qlora_tui.recipe.presets import Preset, Snapshot, restore, take_snapshot

EDITORS = ("sensible-editor", "nano", "vim", "vi")
"""Tried in this order where neither VISUAL nor EDITOR is set."""


def bring_in(path: Path, *, overwrite: bool = False) -> Snapshot:
    """Copy a preset file, comments and all, among the user's; gives what was there before, for an undo.

    Raises Problem where it is no preset, and WouldOverwrite where an edited one of its name is there.
    """
    toml.load(path)
    before = take_snapshot(path.stem)
    restore(Snapshot(path.stem, path.read_bytes()), overwrite=overwrite)
    return before


def send_out(preset: Preset, target: Path) -> Path:
    """Copy a preset's file to ``target``, a file or a folder. Raises Problem."""
    target = target / preset.path.name if target.is_dir() else target
    try:
        atomic_write(target, preset.path.read_bytes())
    except OSError as error:
        raise Problem(
            "Preset not exported", what=f"{target}: {error.strerror or error}.", fix="Give another path."
        ) from error
    return target


def editor() -> list[str]:
    """The user's editor as a command. Raises Problem where there is none."""
    wanted = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if wanted:
        return shlex.split(wanted)
    found = next(filter(None, map(shutil.which, EDITORS)), None)
    if found is None:
        raise Problem("No editor", what="Neither VISUAL nor EDITOR is set.", fix="export EDITOR=nano")
    return [found]


def edit(preset: Preset) -> None:
    """Open the file in the user's editor and wait. Raises Problem; what was written is kept in any case."""
    if preset.shipped:
        raise Problem(
            "A shipped preset stays as it is",
            what=f"{preset.name} came with the program.",
            fix="Open it, save it under a name of your own (s), and edit that.",
        )
    command = editor()
    try:
        subprocess.run([*command, str(preset.path)], check=False)
    except OSError as error:
        raise Problem(
            "The editor did not start",
            what=f"{command[0]}: {error.strerror}.",
            fix="Set EDITOR to one that is here.",
        ) from error
