"""``config.toml``: settings that apply to every recipe. Read here; ``settings_file`` changes it for
the settings screen."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import EXIT_USAGE, UserError

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
        _about("Theme", "Colors of the app. Themes of your own: TOML files in the themes folder."),
    ] = "harbour"
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
            "GPU memory to assume",
            "GiB that estimates are for, on every start. Empty: this machine's GPU.",
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
            "Quantized weights",
            "Most GiB of quantized base weights to keep, so that later runs load faster. 0: none.",
            ge=0,
        ),
    ] = 30.0
    gpu: Annotated[
        str | Annotated[int, Meta(ge=0)],
        _about(
            "GPU",
            "Which of several to use: number, UUID or a part of its name. auto: the most memory. cpu: none. "
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
        raise UserError(
            "Cannot use config.toml",
            what=f"{path}: {error}.",
            fix=f"Its keys are {known}.",
            exit_code=EXIT_USAGE,
        ) from error
