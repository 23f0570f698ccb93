"""Import, export and editing of preset files."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write
from qlora_tui.recipe import toml
from qlora_tui.recipe.presets import OverwriteError, Preset, PresetSnapshot, restore, save, take_snapshot
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import key_name

EDITORS = ("sensible-editor", "nano", "vim", "vi")
"""Tried in this order where neither VISUAL nor EDITOR is set."""


def save_as(
    name: str, recipe: Recipe, *, note: str = "", own: str = "", overwrite: bool = False
) -> PresetSnapshot:
    """Save as the user's preset ``name``; gives what was there before, for an undo.

    Raises OverwriteError where the user has one of that name that is not their ``own``, or was edited.
    """
    before = take_snapshot(name)
    if not overwrite and name != own and before.content is not None:
        raise OverwriteError("Preset exists", what=f"You already have a preset {name}. It would be replaced.")
    save(name, recipe, note=note, overwrite=overwrite)
    return before


def import_preset(path: Path, *, overwrite: bool = False) -> PresetSnapshot:
    """Copy a preset file, with its comments, to the user's presets. Returns what it replaced, for undo.

    Raises UserError if it is not a preset, and OverwriteError if an edited preset of that name exists.
    """
    toml.load(path)
    before = take_snapshot(path.stem)
    restore(PresetSnapshot(path.stem, path.read_bytes()), overwrite=overwrite)
    return before


def export_preset(preset: Preset, target: Path, *, overwrite: bool = False) -> None:
    """Copy a preset's file to ``target``, a file or a folder. Raises UserError."""
    target = target / preset.path.name if target.is_dir() else target
    if not overwrite and target.exists():
        raise OverwriteError("File already exists", what=f"{target} would be replaced.")
    try:
        atomic_write(target, preset.path.read_bytes())
    except OSError as error:
        raise UserError(
            "Preset not exported", what=f"{target}: {error.strerror or error}.", fix="Choose another path."
        ) from error


def editor() -> list[str]:
    """The user's editor as a command. Raises UserError where there is none."""
    variable, wanted = _editor_setting()
    if wanted:
        try:
            return shlex.split(wanted)
        except ValueError as error:
            what = f"{variable} is {wanted}: {error}."
            raise UserError("Invalid editor command", what=what, fix=_set_editor_hint()) from error
    default_editor = next(filter(None, map(shutil.which, EDITORS)), None)
    if default_editor is None:
        raise UserError("No editor", what="Neither VISUAL nor EDITOR is set.", fix=_set_editor_hint())
    return [default_editor]


def _editor_setting() -> tuple[str, str]:
    """(variable, value) of the setting that names the editor; EDITOR and an empty value if none does."""
    visual = os.environ.get("VISUAL", "").strip()
    return ("VISUAL", visual) if visual else ("EDITOR", os.environ.get("EDITOR", "").strip())


def _set_editor_hint() -> str:
    return f"Quit the app, set one with `export {_editor_setting()[0]}=nano`, and start it again."


def edit(preset: Preset) -> None:
    """Open the file in the user's editor and wait. Raises UserError; what was written stays in any case."""
    if preset.shipped:
        raise UserError(
            "Shipped presets cannot be edited",
            what=f"{preset.name} is part of qlora-tui.",
            fix=f"Open it, press {key_name('presets.save')} to save it under another name, then edit that.",
        )
    command = editor()
    try:
        # Our own standard error is a file while the app runs; the editor's is for the person before it.
        run = subprocess.run([*command, str(preset.path)], stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise UserError(
            "The editor did not start", what=f"{command[0]}: {error.strerror}.", fix=_set_editor_hint()
        ) from error
    if ended := run.returncode:
        how = f"exit status {ended}" if ended > 0 else f"signal {-ended}"
        raise UserError(
            "The editor exited with an error",
            what=f"{shlex.join(command)} ended with {how}. The preset is as the editor left it.",
            fix=_set_editor_hint(),
        )
