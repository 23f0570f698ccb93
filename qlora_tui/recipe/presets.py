"""Presets: named layers in TOML files, shipped ones and the user's.

A user's preset hides the shipped one of the same name. One that cannot be read is listed with its
problem. What the app writes starts with a line that holds a hash of the rest, by which it knows its own
files from those that a person wrote or edited: it replaces the latter only when told to.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import atomic_write
from qlora_tui.recipe import toml
from qlora_tui.recipe.schema import Data, Model, Recipe
from qlora_tui.recipe.suggestions import did_you_mean

_HEADER = re.compile(rb"# Written by qlora-tui, which asks before it replaces an edit: ([0-9a-f]{64})\n")
_MAX_NAME_BYTES = 60


class Preset(Struct, frozen=True, kw_only=True):
    """A preset as found."""

    name: str
    """The file's name without ``.toml``."""
    note: str
    """Its ``note``: what it is for."""
    path: Path
    shipped: bool
    """Came with the program; False for one of the user's."""
    layer: dict[str, Any]
    """As the file has it; empty where there is a problem."""
    problem: UserError | None = None
    """Why it cannot be used."""

    def settings(self) -> dict[str, Any]:
        """The layer without name and note, which are the preset's own. Raises its problem."""
        if self.problem:
            raise self.problem
        return {key: value for key, value in self.layer.items() if key not in ("name", "note")}

    def recipe(self, current: Recipe | None = None) -> Recipe:
        """The preset over the defaults, with the model and data of ``current``, its name and note.

        Raises its problem.
        """
        recipe = toml.to_recipe(self.settings(), str(self.path))
        if current is None:
            return recipe
        replace = msgspec.structs.replace
        model, data = current.model, current.data
        return replace(
            recipe,
            name=current.name,
            note=current.note,
            model=replace(recipe.model, id=model.id, revision=model.revision),
            data=replace(recipe.data, sources=data.sources, validation_path=data.validation_path),
        )


class OverwriteError(UserError):
    """A file that the app did not write, or that was edited since, would be lost. To be asked about."""


class Snapshot(Struct, frozen=True):
    """A user's preset file as it was, to undo a save or a deletion with :func:`restore`."""

    name: str
    content: bytes | None
    """None: there was no file."""


def list_presets() -> list[Preset]:
    """All presets by name. Never raises: what cannot be read has a ``problem``."""
    by_name: dict[str, Preset] = {}
    for folder, shipped in ((paths.shipped_dir("presets"), True), (_user_dir(), False)):
        for path in sorted(folder.glob("[!.]*.toml")) if folder else ():
            preset = _read_preset(path, shipped)
            by_name[preset.name] = preset
    return [by_name[name] for name in sorted(by_name)]


def find_preset(name: str) -> Preset:
    """The preset of that name, which may have a problem. Raises UserError with the near match."""
    by_name = {preset.name: preset for preset in list_presets()}
    if name in by_name:
        return by_name[name]
    hint = did_you_mean(name.removesuffix(".toml"), by_name)
    raise UserError(
        "Unknown preset",
        what=f'There is no preset "{name}".',
        why=f"The presets are {', '.join(by_name) or 'none'}.",
        fix=hint[:1].upper() + hint[1:],
        exit_code=EXIT_USAGE,
    )


def save(name: str, recipe: Recipe, *, note: str = "", overwrite: bool = False) -> Path:
    """Write what ``recipe`` changes from the defaults as the user's preset ``name``; return its path.

    Model id, revision and data files are left out: a preset is for any of them. The file is replaced in one
    step. Raises OverwriteError, unless told to ``overwrite``, where the file there is not as the app wrote
    it; UserError where the name is not a file name, the recipe is not valid, or the disk says no.
    """
    path = _user_path(name)
    body = toml.dump_overrides(_for_any_model(recipe, note), Recipe())
    toml.validate(toml.parse(body, name), name)
    if not overwrite:
        _check_overwrite(path)
    _write(path, _with_hash_line(body.encode()))
    return path


def delete(name: str) -> Snapshot:
    """Remove the user's preset ``name``; a shipped one of that name appears again. Undo with ``restore``."""
    snapshot = take_snapshot(name)
    if snapshot.content is None:
        shipped = any(preset.name == name for preset in list_presets())
        raise UserError(
            "Preset not deleted",
            what=f'"{name}" is a bundled preset.' if shipped else f'You have no preset "{name}".',
            fix="Save your own preset under that name to replace it." if shipped else "",
            exit_code=EXIT_USAGE,
        )
    try:
        _user_path(name).unlink(missing_ok=True)
    except OSError as error:
        raise _disk_error("Preset not deleted", _user_path(name), error) from error
    return snapshot


def take_snapshot(name: str) -> Snapshot:
    """The user's preset ``name`` as it is now, or that there is none: take one before a save."""
    path = _user_path(name)
    try:
        return Snapshot(name, path.read_bytes())
    except FileNotFoundError:
        return Snapshot(name, None)
    except OSError as error:
        raise _disk_error("Cannot read preset", path, error) from error


def restore(snapshot: Snapshot, *, overwrite: bool = False) -> None:
    """Bring a user's preset back to a snapshot, byte by byte. Raises as ``save`` does."""
    path = _user_path(snapshot.name)
    if not overwrite:
        _check_overwrite(path)
    if snapshot.content is not None:
        _write(path, snapshot.content)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _disk_error("Preset not restored", path, error) from error


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


def _for_any_model(recipe: Recipe, note: str) -> Recipe:
    replace = msgspec.structs.replace
    model, data = Model(), Data()
    return replace(
        recipe,
        name="",
        note=note,
        model=replace(recipe.model, id=model.id, revision=model.revision),
        data=replace(recipe.data, sources=data.sources, validation_path=data.validation_path),
    )


def _user_dir() -> Path | None:
    """None where the home cannot be written, and so holds no presets."""
    try:
        return paths.user_presets_dir()
    except OSError:
        return None


def _user_path(name: str) -> Path:
    reason = _name_error(name)
    if reason:
        raise UserError(
            "Invalid preset name",
            what=f"{name!r} {reason}.",
            fix="Use letters, digits, dashes and dots: my-preset.",
            exit_code=EXIT_USAGE,
        )
    try:
        return paths.user_presets_dir() / f"{name}.toml"
    except OSError as error:
        raise _disk_error("No folder for presets", Path(error.filename or "."), error) from error


def _name_error(name: str) -> str:
    if not name.strip():
        return "is empty"
    if len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    if "/" in name or "\\" in name:
        return "has a slash in it"
    if name[0] in ".-":
        return f'starts with "{name[0]}"'
    if name != name.strip() or not name.isprintable():
        return "contains white space or control characters"
    return "ends in .toml, which is added" if name.endswith(".toml") else ""


def _check_overwrite(path: Path) -> None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _disk_error("Cannot read preset", path, error) from error
    if _is_unedited(content):
        return
    raise OverwriteError(
        "Preset exists",
        what=f"{path} was written or edited by hand, and would be replaced.",
        fix="Save under another name, or confirm the overwrite.",
    )


def _with_hash_line(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return f"# Written by qlora-tui, which asks before it replaces an edit: {digest}\n".encode() + body


def _is_unedited(content: bytes) -> bool:
    header = _HEADER.match(content)
    return header is not None and _with_hash_line(content[header.end() :]) == content


def _write(path: Path, content: bytes) -> None:
    """Through a link, so that a preset kept among someone's dotfiles stays there."""
    try:
        atomic_write(path.resolve() if path.exists() else path, content, durable=True)
    except OSError as error:
        raise _disk_error("Preset not saved", path, error) from error


def _disk_error(title: str, path: Path, error: OSError) -> UserError:
    what = f"{path}: {error.strerror or error}."
    return UserError(title, what=what, fix="Check free disk space and write permission there.")
