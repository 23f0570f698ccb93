"""``config.toml``: settings that apply to every recipe, read and changed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from qlora_tui import paths
from qlora_tui.errors import UsageError, UserError, disk_problems
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.formatting import capitalize
from qlora_tui.hours import Hours

GPU_VARIABLE = "QLORA_TUI_GPU"
"""Environment variable that ``--gpu`` sets for a command and its processes. It overrides ``gpu``."""


_PRICE = re.compile(r"([^\d\s.,-]*)\s*(\d+(?:[.,]\d+)?)\s*([^\d]*)")


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
            "URL that receives a small JSON message when a run has ended, whether the app is open or not.",
            pattern=r"^(https?://\S+)?$",
        ),
    ] = ""
    command: Annotated[
        str,
        _about(
            "Command",
            "Shell command to run when a run has ended, whether the app is open or not; $QLORA_TUI_TEXT "
            "contains the message, one sentence.",
        ),
    ] = ""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The user's settings, all optional. Settings with a label are on the settings screen."""

    theme: Annotated[
        str,
        _about(
            "Theme",
            "Colors of the app. auto: harbour, or the terminal's own colors if it has only 16. terminal: "
            "derived from the terminal's own colors. Add themes as TOML files in the themes folder.",
        ),
    ] = "auto"
    mouse: Annotated[
        bool,
        _about(
            "Mouse",
            "Click and scroll in the app. If off, the terminal selects text as usual. Takes effect at the "
            "next start.",
        ),
    ] = True
    gpu_memory_gib: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        _about(
            "GPU memory to assume, GiB",
            "GPU memory to assume in estimates. Empty: use this machine's GPU.",
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
            "GPU to use: number, UUID or part of its name. auto: the GPU with the most memory. cpu: none. "
            "Takes effect at the next start.",
        ),
    ] = "auto"
    hours: Annotated[
        str,
        _about(
            "Hours",
            "Hours in which runs train, such as 23:00-07:00, sat-sun. A day without hours means the "
            "whole day. Outside of these hours, a run saves, frees the GPU, and later continues by itself. "
            "Empty: always.",
        ),
    ] = ""
    yields: Annotated[
        bool,
        _about(
            "Yield",
            "Pause a run while another program, such as a game or Ollama, uses its GPU: the run saves, frees "
            "the memory, and continues when that program has ended.",
        ),
    ] = msgspec.field(default=False, name="yield")
    max_temperature_c: Annotated[
        Annotated[int, Meta(ge=40, le=110)] | None,
        _about(
            "Maximum temperature, °C",
            "GPU temperature above which a run rests between micro-batches. Empty: only the driver's limit "
            "applies.",
        ),
    ] = None
    max_power_w: Annotated[
        Annotated[int, Meta(ge=20, le=2000)] | None,
        _about(
            "Maximum power, W",
            "Mean GPU power above which a run rests between micro-batches. Empty: only the driver's limit "
            "applies.",
        ),
    ] = None
    price_per_kwh: Annotated[
        str | float,
        _about(
            "Price of a kWh",
            "Price with its currency, such as 0.30 EUR. If set, the cost of a run is shown next to its "
            "energy. Only the energy of the GPU is counted.",
        ),
    ] = ""
    notify: NotificationSettings = NotificationSettings()
    keymap: dict[str, str] = {}
    """Keys by command, as in ``"train.stop" = "x"``; F1 in the app lists every command."""

    def __post_init__(self) -> None:
        for name, parse in _PARSED.items():
            try:
                parse(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @property
    def training_hours(self) -> Hours:
        """The hours in which runs may train."""
        return parse_hours(self.hours)

    def cost(self, kwh: float | None) -> str:
        """Return the cost of energy, such as ``0.07 EUR``; empty if the energy or the price is unknown."""
        price = parse_price(self.price_per_kwh)
        if kwh is None or price is None:
            return ""
        before, amount, after = price
        cost = kwh * amount
        figure = "<0.01" if 0 < cost < 0.01 else f"{cost:,.2f}"
        return f"{before}{figure} {after}".strip() if before or after else f"cost {figure}"


KEYS_IN_FILE = {field.name: field.encode_name for field in msgspec.structs.fields(Settings)}
"""Name of each setting in ``config.toml``, by its field name."""


@cache
def parse_hours(text: str) -> Hours:
    """Parse the value of ``hours``. Raises ValueError, whose text tells the user what is wrong."""
    return Hours.parse(text)


@cache
def parse_price(text: str | float) -> tuple[str, float, str] | None:
    """Return the unit before a price, its amount, and the unit after it; None if there is no price.

    Raises ValueError, whose text tells the user what is wrong.
    """
    if not (written := str(text).strip()):
        return None
    match = _PRICE.fullmatch(written)
    if match is None:
        raise ValueError(f"{written} is not a price such as 0.30 EUR")
    before, amount, after = match.groups()
    return before, float(amount.replace(",", ".")), after.strip()


_PARSED: dict[str, Callable[[Any], object]] = {"hours": parse_hours, "price_per_kwh": parse_price}
"""Parsers of settings with a text value. Their ValueErrors say what is wrong."""


def setting_problem(name: str, value: Any) -> str:
    """Return what is wrong with the text of a setting, in a sentence; empty if nothing is wrong."""
    try:
        _PARSED.get(name, str)(value)
    except ValueError as error:
        return f"{capitalize(str(error))}{'' if str(error).endswith('.') else '.'}"
    return ""


class LiveSettings:
    """The current settings, for processes that keep running while the file is changed."""

    def __init__(self) -> None:
        self._read_from: tuple[Path | None, int | None] = None, None
        """The file that was read last, and its modification time then."""
        self._settings = Settings()

    def read(self) -> Settings:
        """Return the current settings, or the last valid ones while the file has errors."""
        path = changed_at = None
        with suppress(OSError):
            path = config_path()
            changed_at = path.stat().st_mtime_ns
        if (path, changed_at) != self._read_from:
            self._read_from = path, changed_at
            with suppress(OSError, UserError):
                self._settings = load_settings()
        return self._settings


_live_settings = LiveSettings()


def current_settings() -> Settings:
    """Return the current settings, or the last valid ones while the file has errors."""
    return _live_settings.read()


def config_path() -> Path:
    """Return the path of the settings file, which may not exist."""
    return paths.config_dir() / "config.toml"


def load_settings() -> Settings:
    """Read the settings, or return the defaults if there is no file. Raises UserError if it is invalid."""
    path = config_path()
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), Settings)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        known = ", ".join(KEYS_IN_FILE.values())
        raise UsageError(
            "Cannot use config.toml",
            what=f"{path}: {error}.",
            fix=f"The keys of config.toml are {known}.",
        ) from error


def settings_problem() -> UserError | None:
    """Return the error that prevents reading the settings; None if they can be read."""
    try:
        load_settings()
    except UserError as problem:
        return problem
    return None


def save_setting(name: str, value: Any) -> Settings:
    """Write one setting and return all of them.

    Args:
        name: Its key in the file, such as ``theme`` or ``notify.bell``.
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
        # Keep a symbolic link, which dotfile managers use.
        atomic_write(path.resolve() if path.exists() else path, text, durable=True)
    return settings
