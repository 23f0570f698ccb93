"""The settings that the screen shows: key in config.toml, label, explanation, and how each is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from qlora_tui.settings import Settings

Kind = Literal["theme", "bool", "number", "text", "folders"]


@dataclass(frozen=True)
class SettingRow:
    """One line of the screen."""

    name: str
    """Key in config.toml, as in ``notify.bell``."""
    label: str
    kind: Kind
    help: str
    at_next_start: bool = False
    """Whether a change waits for the next start of the app."""


ROWS = (
    SettingRow(
        "theme",
        "Theme",
        "theme",
        "Colors of the app. Themes of your own: TOML files in the themes folder.",
    ),
    SettingRow(
        "mouse",
        "Mouse",
        "bool",
        "Click and scroll in the app. Off, the terminal selects text as usual.",
        at_next_start=True,
    ),
    SettingRow(
        "card_gib",
        "GPU memory to assume",
        "number",
        "GiB that estimates are for, on every start. Empty: this machine's GPU.",
    ),
    SettingRow(
        "model_folders",
        "Model folders",
        "folders",
        "Where to look for models beside the Hugging Face cache, separated by colons.",
    ),
    SettingRow(
        "quantized_cache_gib",
        "Quantized weights",
        "number",
        "Most GiB of quantized base weights to keep, so that later runs load faster. 0: none.",
    ),
    SettingRow(
        "gpu",
        "GPU",
        "text",
        "Which of several to use: number, UUID or a part of its name. auto: the most memory. cpu: none.",
        at_next_start=True,
    ),
    SettingRow(
        "notify.bell",
        "Bell",
        "bool",
        "Ring the terminal's bell when a run has ended.",
    ),
    SettingRow(
        "notify.title",
        "Window title",
        "bool",
        "Show in the window's title how a run has ended.",
    ),
    SettingRow(
        "notify.desktop",
        "Desktop notification",
        "bool",
        "Ask the terminal for a desktop notification when a run has ended (OSC 9).",
    ),
    SettingRow(
        "notify.webhook",
        "Webhook",
        "text",
        "URL that gets a small JSON message when a run has ended, whether the app is open or not.",
    ),
    SettingRow(
        "notify.command",
        "Command",
        "text",
        "Shell command to run when a run has ended; $QLORA_TUI_TEXT is the message.",
    ),
)


def setting_value(settings: Settings, name: str) -> Any:
    """The current value of a setting, as in the file."""
    value: Any = msgspec.to_builtins(settings)
    for part in name.split("."):
        value = value[part]
    return value


def shown_value(kind: Kind, value: Any) -> str:
    """The value as the list shows it."""
    if value is None or value in ("", []):
        return "none"
    match kind:
        case "bool":
            return "on" if value else "off"
        case "folders":
            return ":".join(value)
        case "number":
            return f"{value:g} GiB"
        case _:
            return str(value)


def typed_value(kind: Kind, text: str) -> Any:
    """The value that was typed; None for an empty text, which restores the default.

    Raises ValueError where it is not a number.
    """
    text = text.strip()
    if not text:
        return None
    if kind == "number":
        return float(text)
    if kind == "folders":
        return tuple(folder for folder in text.split(":") if folder.strip())
    return text


def check_typed(kind: Kind) -> Callable[[str], str]:
    """A check for a prompt: what is wrong with a text, or an empty string."""

    def check(text: str) -> str:
        try:
            value = typed_value(kind, text)
        except ValueError:
            return "Enter a number of GiB, such as 12."
        if kind == "folders":
            missing = [folder for folder in value or () if not Path(folder).expanduser().is_dir()]
            return f"There is no folder {missing[0]}." if missing else ""
        return ""

    return check
