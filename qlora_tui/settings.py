"""``config.toml``: settings that apply to every recipe. Read here; ``settings_file`` changes it for
the settings screen."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import EXIT_USAGE, UserError

GPU_VARIABLE = "QLORA_TUI_GPU"
"""Environment variable that ``--gpu`` sets, for a command and its processes; it comes before ``gpu``."""


class NotificationSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Notifications when a run finishes or fails."""

    bell: bool = True
    """Ring the terminal's bell while the app is open."""
    title: bool = True
    """Show the result in the window title while the app is open."""
    desktop: bool = True
    """Ask the terminal for a desktop notification (OSC 9) while the app is open."""
    webhook: Annotated[str, Meta(pattern=r"^(https?://\S+)?$")] = ""
    """URL that receives a small JSON body by POST, whether the app is open or not."""
    command: str = ""
    """Shell command, run whether the app is open or not; ``$QLORA_TUI_TEXT`` is the message, one sentence."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The user's own settings; all are optional."""

    theme: str = "harbour"
    """Name of a theme (``qlora-tui locate`` prints the folders)."""
    model_folders: tuple[str, ...] = ()
    """Folders to search for models, in addition to the Hugging Face cache."""
    keymap: dict[str, str] = {}
    """Keys by command, as in ``"train.stop" = "x"``; F1 in the app lists every command."""
    mouse: bool = True
    notify: NotificationSettings = NotificationSettings()
    quantized_cache_gib: Annotated[float, Meta(ge=0)] = 30.0
    """Most GiB of quantized base weights to store for later runs and chats. 0: none."""
    gpu_memory_gib: Annotated[float, Meta(gt=0)] | None = msgspec.field(default=None, name="card_gib")
    """GPU memory in GiB to estimate against, instead of this machine's."""
    gpu: str | Annotated[int, Meta(ge=0)] = "auto"
    """GPU to use: ``auto``, ``cpu``, or number, UUID or a part of the name of one of several."""


def config_path() -> Path:
    """Path of the settings file, which may not exist."""
    return paths.config_dir() / "config.toml"


def load_settings() -> Settings:
    """Read the settings, or return the defaults if there is no file. Raises UserError if it is invalid."""
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
