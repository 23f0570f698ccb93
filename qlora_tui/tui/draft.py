"""The draft: the recipe being edited, in a file, so that a closed terminal or a power cut loses no edit.

One file serves all apps of an account. Each remembers what it last read or wrote there, and sees so whether
another has changed it since.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.files import atomic_write, read_regular, sync
from qlora_tui.locks import locked
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import dump, parse, read_text, to_recipe, validate

if TYPE_CHECKING:
    from qlora_tui.tui.workbench import Workbench

_PRESET_COMMENT = "# began as "
"""First line of the draft, before the preset's name."""
_LOCK_S = 0.5
"""How long another app may take to write its draft."""


@dataclass(frozen=True)
class SavedDraft:
    """What the file held."""

    recipe: Recipe | None = None
    """None where there is no draft, or it could not be read."""
    preset: str = ""
    """Name of the preset that the recipe started as; empty for the defaults."""
    error: UserError | None = None
    """Why the draft could not be read, and where its copy is."""


class Draft:
    """The draft file as one app knows it."""

    def __init__(self) -> None:
        self._known: str | None = None
        """What this app last read or wrote."""
        self._seen: tuple[int, int] | None = None
        """Inode and time of the file when it was last compared with that."""
        self._aside: Path | None = None
        self._is_settled = False
        """Whether the draft was written since the last conflict: the next one needs another file."""

    def load(self) -> SavedDraft:
        """Read the draft. One that cannot be read is moved aside, so that a save does not overwrite it."""
        with _draft_lock():
            self._known = None
            try:
                content = _content()
                if content is None:
                    return SavedDraft()
                recipe, preset = _read_draft()
                self._known = content
                return SavedDraft(recipe, preset)
            except UserError as problem:
                return SavedDraft(error=_move_aside(problem))
            except OSError as error:
                unreadable = UserError("", what=f"{draft_path()}: {error.strerror or error}.")
                return SavedDraft(error=_move_aside(unreadable))

    def save(self, workbench: Workbench, *, replace: bool = False) -> bool:
        """Write the workbench to the disk; False where another app changed the draft, which then stays.

        Both are on the disk afterwards: what is not in the draft is in :attr:`aside`, which with ``replace``
        is the other app's. Raises OSError.
        """
        text = f"{_PRESET_COMMENT}{workbench.preset}\n{dump(workbench.recipe)}"
        with _draft_lock():
            on_disk = _content()
            if on_disk is not None and on_disk not in (self._known, text):
                if self._is_settled:
                    self._aside, self._is_settled = None, False
                atomic_write(self.aside, _encoded(on_disk if replace else text), durable=True)
                if not replace:
                    return False
            if on_disk != text:
                atomic_write(draft_path(), text, durable=True)
            self._known, self._is_settled = text, True
        return True

    @property
    def aside(self) -> Path:
        """Where the recipe is that lost against another app's."""
        if self._aside is None:
            self._aside = _free_name("other")
        return self._aside

    def is_changed_elsewhere(self) -> bool:
        """Whether another app has changed the draft since the last call, and since this app wrote it."""
        try:
            status = draft_path().stat()
            if self._known is None or self._seen == (status.st_ino, status.st_mtime_ns):
                return False
            self._seen = (status.st_ino, status.st_mtime_ns)
            return _content() not in (self._known, None)
        except OSError:
            return False


def draft_written_at() -> float:
    """Unix time of the last change of the recipe; 0 where there was none."""
    try:
        return draft_path().stat().st_mtime
    except OSError:
        return 0.0


def draft_path() -> Path:
    return paths.state_dir() / "draft.toml"


def _content() -> str | None:
    """The draft as text, whatever bytes are in it; None where there is none."""
    try:
        return read_regular(draft_path()).decode(errors="surrogateescape")
    except FileNotFoundError:
        return None


def _read_draft() -> tuple[Recipe, str]:
    """The recipe and the name of the preset it began as. Raises UserError."""
    text, origin = read_text(draft_path()), str(draft_path())
    layer = parse(text, origin)
    validate(layer, origin, text)
    return to_recipe(layer, origin), text.partition("\n")[0].removeprefix(_PRESET_COMMENT).strip()


def _move_aside(problem: UserError) -> UserError:
    """Keep a draft that cannot be read under another name; what to say of it."""
    aside = _free_name("damaged")
    try:
        draft_path().rename(aside)
        sync(aside.parent)
        message = f"It was saved as {aside}: open it in an editor, or with the version that wrote it."
    except OSError as error:
        message = f"Move {draft_path()} away: that failed here ({error.strerror or error})."
    return UserError(
        "The recipe being edited could not be read", what=problem.what, why=problem.why, fix=message
    )


def _free_name(why: str) -> Path:
    aside = draft_path().with_name(f"{draft_path().name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}-2")
    return aside


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


@contextmanager
def _draft_lock() -> Iterator[None]:
    """Keep other apps from writing meanwhile, where the file system has locks."""
    with ExitStack() as stack:
        with suppress(UserError):
            stack.enter_context(locked(paths.state_dir() / "draft.lock", patience_s=_LOCK_S))
        yield
