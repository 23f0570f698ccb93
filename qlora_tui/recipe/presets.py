"""Presets, which are named layers in TOML files: those shipped with the program and the user's.

A user's preset hides the shipped one of the same name. A preset that cannot be read is listed with its
problem. A file that the app writes starts with a line that has a hash of the rest. This distinguishes it from
files that a person wrote or edited, which the app replaces only with ``overwrite``.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.files import atomic_write
from qlora_tui.formatting import capitalize
from qlora_tui.recipe import toml
from qlora_tui.recipe.aliases import did_you_mean
from qlora_tui.recipe.fields import DESCRIPTIVE
from qlora_tui.recipe.schema import Recipe

_HEADER = re.compile(
    rb"# Written by qlora-tui\. Edit it freely: a checksum tells the app that you did, ([0-9a-f]{64})\n"
)
"""First line of a file that the app wrote."""
_MAX_NAME_BYTES = 60
_CHECK_DISK = "Check free disk space and write permission there."


class Preset(Struct, frozen=True, kw_only=True):
    """A preset, valid or not."""

    name: str
    """The file's name without ``.toml``."""
    note: str
    """The preset's ``note``: its purpose."""
    path: Path
    shipped: bool
    """Whether the preset is shipped with the program; False for one of the user's."""
    layer: dict[str, Any]
    """Content of the file; empty if the preset has a problem."""
    problem: UserError | None = None
    """Why the preset cannot be used; None for a valid preset."""

    def settings(self) -> dict[str, Any]:
        """Return the layer without the preset's own name and note. Raises the preset's problem."""
        if self.problem:
            raise self.problem
        return {key: value for key, value in self.layer.items() if key not in DESCRIPTIVE}

    def recipe(self, current: Recipe | None = None) -> Recipe:
        """Build a recipe from the preset over the defaults. Raises the preset's problem, if it has one.

        If ``current`` is given, the recipe has its model ID, revision, starting adapter, data files, name and
        note.
        """
        recipe = toml.to_recipe(self.settings(), str(self.path))
        if current is None:
            return recipe
        return _of_model(recipe, current, current.name, current.note)


class OverwriteError(UserError):
    """Raised if saving would replace a file that was edited, or that the app did not write. The caller should
    ask first.
    """


class PresetSnapshot(Struct, frozen=True):
    """Content of a user's preset file, for undoing a save or a deletion with :func:`restore`."""

    name: str
    content: bytes | None
    """Content of the file; None if there was no file."""


def list_presets() -> list[Preset]:
    """Return all presets, sorted by name, without shipped ones that a user's preset hides.

    Never raises: an unreadable preset has a ``problem``.
    """
    by_name: dict[str, Preset] = {}
    for folder, shipped in ((paths.shipped_dir("presets"), True), (_user_dir(), False)):
        for path in sorted(folder.glob("[!.]*.toml")) if folder else ():
            preset = _read_preset(path, shipped)
            by_name[preset.name] = preset
    return [by_name[name] for name in sorted(by_name)]


def find_preset(name: str) -> Preset:
    """Return the preset with this name, even if the preset is invalid.

    If there is no such preset, raises UserError, which suggests a similar name if there is one.
    """
    by_name = {preset.name: preset for preset in list_presets()}
    if name in by_name:
        return by_name[name]
    hint = did_you_mean(name.removesuffix(".toml"), by_name)
    raise UsageError(
        "Unknown preset",
        what=f'There is no preset "{name}".',
        why=f"The presets are {', '.join(by_name) or 'none'}.",
        fix=capitalize(hint),
    )


def save(name: str, recipe: Recipe, *, note: str = "", overwrite: bool = False) -> Path:
    """Save the settings in which ``recipe`` differs from the defaults as a preset; return its path.

    Model ID, revision, starting adapter and data files are left out, because a preset applies to any model
    and data. The file is replaced in one step.

    Raises OverwriteError, without ``overwrite``, if the existing file is not as the app wrote it. Raises
    UserError if the name is not a valid file name or the recipe is not valid, and for a disk error.
    """
    path = _user_path(name)
    body = toml.dump_overrides(_of_model(recipe, Recipe(), "", note), Recipe())
    toml.validate(toml.parse(body, name), name)
    if not overwrite:
        _check_overwrite(path)
    digest = hashlib.sha256(body.encode()).hexdigest()
    note = "Edit it freely: a checksum tells the app that you did"
    _write(path, f"# Written by qlora-tui. {note}, {digest}\n{body}".encode())
    return path


def delete(name: str) -> PresetSnapshot:
    """Delete the user's preset ``name``; a shipped preset of this name becomes visible again.

    Undo with ``restore``.
    """
    snapshot = take_snapshot(name)
    if snapshot.content is None:
        shipped = any(preset.name == name for preset in list_presets())
        raise UsageError(
            "Preset not deleted",
            what=f'"{name}" is a bundled preset.' if shipped else f'You have no preset "{name}".',
            fix="Save your own preset under that name to replace it." if shipped else "",
        )
    path = _user_path(name)
    with disk_problems("Preset not deleted", path, _CHECK_DISK):
        path.unlink(missing_ok=True)
    return snapshot


def take_snapshot(name: str) -> PresetSnapshot:
    """Record the current content or absence of the user's preset ``name``; call it before a save."""
    return PresetSnapshot(name, _content(_user_path(name)))


def _content(path: Path) -> bytes | None:
    """Return the content of a preset's file; None if there is no file."""
    with disk_problems("Cannot read preset", path, _CHECK_DISK):
        return path.read_bytes() if path.exists() else None


def restore(snapshot: PresetSnapshot, *, overwrite: bool = False) -> None:
    """Restore a user's preset to a snapshot, byte for byte. Raises the same errors as ``save``."""
    path = _user_path(snapshot.name)
    if not overwrite:
        _check_overwrite(path)
    if snapshot.content is not None:
        _write(path, snapshot.content)
        return
    with disk_problems("Preset not restored", path, _CHECK_DISK):
        path.unlink(missing_ok=True)


def _read_preset(path: Path, shipped: bool) -> Preset:
    name = path.stem.encode("utf-8", "replace").decode()
    layer: dict[str, Any] = {}
    problem = None
    try:
        layer = toml.load(path)
    except UserError as error:
        problem = error
    return Preset(
        name=name, note=layer.get("note", ""), path=path, shipped=shipped, layer=layer, problem=problem
    )


def _of_model(recipe: Recipe, other: Recipe, name: str, note: str) -> Recipe:
    """Return the recipe with this name and note, and with model, starting adapter and data of another."""
    replace = msgspec.structs.replace
    model, data = other.model, other.data
    return replace(
        recipe,
        name=name,
        note=note,
        model=replace(recipe.model, id=model.id, revision=model.revision),
        lora=replace(recipe.lora, init_from=other.lora.init_from),
        data=replace(recipe.data, sources=data.sources, validation_path=data.validation_path),
    )


def _user_dir() -> Path | None:
    """Return the user's presets folder; None if the home folder cannot be written."""
    try:
        return paths.user_presets_dir()
    except OSError:
        return None


def _user_path(name: str) -> Path:
    reason = _name_error(name)
    if reason:
        raise UsageError(
            "Invalid preset name",
            what=f"{name!r} {reason}.",
            fix="Use letters, digits, dashes and dots, as in my-preset.",
        )
    with disk_problems("No folder for presets", fix=_CHECK_DISK):
        return paths.user_presets_dir() / f"{name}.toml"


def _name_error(name: str) -> str:
    if not name.strip():
        return "is empty"
    if len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    if "/" in name or "\\" in name:
        return "has a slash in it"
    if name[0] in ".-":
        return f'starts with "{name[0]}"'
    if name != name.strip():
        return "starts or ends with white space"
    if not name.isprintable():
        return "contains characters that cannot be printed"
    return "ends in .toml, which is added" if name.endswith(".toml") else ""


def _check_overwrite(path: Path) -> None:
    content = _content(path)
    header = _HEADER.match(content or b"")
    if content is None or (
        header and header[1].decode() == hashlib.sha256(content[header.end() :]).hexdigest()
    ):
        return
    raise OverwriteError(
        "Preset exists",
        what=f"{path} was written or edited by hand, and would be replaced.",
        fix="Save under another name, or confirm the overwrite.",
    )


def _write(path: Path, content: bytes) -> None:
    """Write through a symbolic link, so that a preset kept in a dotfiles repository stays there."""
    with disk_problems("Preset not saved", path, _CHECK_DISK):
        atomic_write(path.resolve() if path.exists() else path, content, durable=True)
