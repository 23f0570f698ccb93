"""``config.toml``: settings that apply to every recipe, read and changed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.files import atomic_write, private_dir

GPU_VARIABLE = "QLORA_TUI_GPU"
"""Environment variable that ``--gpu`` sets, for a command and its processes; it comes before ``gpu``."""


def _about(label: str, help_: str, **bounds: Any) -> Meta:
    return Meta(title=label, description=help_, **bounds)


class NotificationSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Notifications when a run finishes or fails."""

    bell: Annotated[bool, _about("Bell", "Ring the terminal's bell when a run has ended.")] = True
    title: Annotated[bool, _about("Window title", "Show in the window's title how a run has ended.")] = True
    desktop: Annotated[
        bool,
        _about(
            "Desktop notification",
            "Ask the terminal for a desktop notification when a run has ended (OSC 9).",
        ),
    ] = True
    webhook: Annotated[
        str,
        _about(
            "Webhook",
            "URL that gets a small JSON message when a run has ended, whether the app is open or not.",
            pattern=r"^(https?://\S+)?$",
        ),
    ] = ""
    command: Annotated[
        str,
        _about(
            "Command",
            "Shell command to run when a run has ended, whether the app is open or not; $QLORA_TUI_TEXT is "
            "the message, one sentence.",
        ),
    ] = ""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The user's own settings; all are optional. Those with a label are on the settings screen."""

    theme: Annotated[
        str,
        _about(
            "Theme",
            "Colors of the app. auto: harbour, or the terminal's own if it has only 16. terminal: derived "
            "from the terminal's own colors. Add themes as TOML files in the themes folder.",
        ),
    ] = "auto"
    mouse: Annotated[
        bool,
        _about(
            "Mouse",
            "Click and scroll in the app. Off, the terminal selects text as usual. Takes effect at the next "
            "start.",
        ),
    ] = True
    gpu_memory_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        _about(
            "GPU memory to assume, GiB",
            "GPU memory that estimates assume, at every start. Empty: this machine's GPU.",
        ),
    ] = msgspec.field(default=None, name="card_gib")
    model_folders: Annotated[
        tuple[str, ...],
        _about(
            "Model folders",
            "Folders to search for models in addition to the Hugging Face cache, separated by colons.",
        ),
    ] = ()
    quantized_cache_gib: Annotated[
        float,
        _about(
            "Quantized weights, GiB",
            "Maximum size of the cache of quantized base weights, from which later runs load faster. 0: no "
            "cache.",
            ge=0,
        ),
    ] = 30.0
    gpu: Annotated[
        str | Annotated[int, Meta(ge=0)],
        _about(
            "GPU",
            "GPU to use: number, UUID or part of its name. auto: the one with the most memory. cpu: none. "
            "Takes effect at the next start.",
        ),
    ] = "auto"
    notify: NotificationSettings = NotificationSettings()
    keymap: dict[str, str] = {}
    """Keys by command, as in ``"train.stop" = "x"``; F1 in the app lists every command."""


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
        raise UsageError(
            "Cannot use config.toml",
            what=f"{path}: {error}.",
            fix=f"Its keys are {known}.",
        ) from error


def save_setting(name: str, value: Any) -> Settings:
    """Write one setting and return all of them.

    Args:
        name: Its key in the file, as in ``theme`` or ``notify.bell``.
        value: The new value; None removes the key, which restores the default.

    Raises:
        UserError: The file cannot be read or written, or the value is not allowed. The file is unchanged.
    """
    import tomlkit  # takes a few ms, which a start avoids

    load_settings()
    path = config_path()
    document = tomlkit.parse(path.read_text("utf-8") if path.exists() else "")
    section, _, key = name.rpartition(".")
    table: Any = document
    if section:
        if section not in document:
            document[section] = tomlkit.table()
        table = document[section]
    if value is None:
        table.pop(key, None)
    else:
        table[key] = list(value) if isinstance(value, tuple) else value
    text = tomlkit.dumps(document)
    try:
        settings = msgspec.toml.decode(text, type=Settings)
    except msgspec.ValidationError as error:
        raise UserError(
            "Setting not changed", what=f"{name}: {error}.", fix="Enter another value."
        ) from error
    fix = "Make the folder writable or free some space, and try again."
    with disk_problems("Setting not saved", path, fix):
        private_dir(path.parent)
        # A link, as dotfiles are managed, stays one.
        atomic_write(path.resolve() if path.exists() else path, text, durable=True)
    return settings
