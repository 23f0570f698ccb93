"""File locations: the XDG directories, and the files that are shipped with the program.

``qlora-tui locate`` prints them. ``XDG_CONFIG_HOME``, ``XDG_STATE_HOME`` and ``XDG_CACHE_HOME`` move them.
Each folder is created on first use, accessible only by its owner.
"""

from __future__ import annotations

from pathlib import Path

import platformdirs

from qlora_tui.files import private_dir

_APP = "qlora-tui"
_PACKAGE = Path(__file__).parent


def config_dir() -> Path:
    """Return the folder of the user's presets, themes and ``config.toml``."""
    return private_dir(Path(platformdirs.user_config_dir(_APP, appauthor=False)))


def state_dir() -> Path:
    """Return the folder of the runs, and of the runner's lock and log."""
    return private_dir(Path(platformdirs.user_state_dir(_APP, appauthor=False)))


def cache_dir() -> Path:
    """Return the folder of files that can be recreated: converted models, tokenized data, downloads."""
    return private_dir(Path(platformdirs.user_cache_dir(_APP, appauthor=False)))


def runs_dir() -> Path:
    """Return the folder with one directory per run."""
    return private_dir(state_dir() / "runs")


def sweeps_dir() -> Path:
    """Return the folder with one directory per sweep."""
    return private_dir(state_dir() / "sweeps")


def log_path() -> Path:
    """Return the file for tracebacks of the app and of commands, and for the app's standard error."""
    return state_dir() / "qlora-tui.log"


def user_presets_dir() -> Path:
    """Return the folder of the user's presets."""
    return private_dir(config_dir() / "presets")


def user_themes_dir() -> Path:
    """Return the folder of the user's themes."""
    return private_dir(config_dir() / "themes")


def shipped_dir(kind: str) -> Path:
    """Return the folder of the shipped ``presets`` or ``themes``, in the wheel or a checkout."""
    installed = _PACKAGE / "shipped" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind
