"""``config.toml``: what holds for every recipe. Written by the user; the app only reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import EXIT_USAGE, UserError


class NotificationSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens when a run finishes or fails."""

    bell: bool = True
    """Ring the terminal's bell, while the app is open."""
    title: bool = True
    """Say it in the window's title, while the app is open."""
    desktop: bool = True
    """Ask the terminal for a desktop notification (OSC 9), while the app is open."""
    webhook: Annotated[str, Meta(pattern=r"^(https?://\S+)?$")] = ""
    """An address that gets a small JSON body by POST, app or no app."""
    command: str = ""
    """A shell command, app or no app; ``$QLORA_TUI_TEXT`` is the news in a sentence."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The user's own settings; every one may be left out."""

    theme: str = "harbour"
    """Name of a theme (see `qlora-tui locate` for the folders)."""
    model_folders: tuple[str, ...] = ()
    """Folders to look for models in, besides the Hugging Face cache."""
    keymap: dict[str, str] = {}
    """Keys by command, as in ``"train.stop" = "x"``; F1 in the app names every command."""
    mouse: bool = True
    notify: NotificationSettings = NotificationSettings()
    gpu_memory_gib: Annotated[float, Meta(gt=0)] | None = msgspec.field(default=None, name="card_gib")
    """Memory to estimate against, where it is not the card of this machine."""


def config_path() -> Path:
    """Where the file is, or would be."""
    return paths.config_dir() / "config.toml"


def load_settings() -> Settings:
    """The settings, or the defaults where there is no file. Raises UserError for one that is wrong."""
    path = config_path()
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Settings)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(Settings))
        raise UserError(
            "Cannot use config.toml",
            what=f"{path}: {error}.",
            fix=f"Its keys are {known}.",
            exit_code=EXIT_USAGE,
        ) from error
