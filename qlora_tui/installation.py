"""The environment that this program is installed in, and the commands that install packages into it."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

PROGRAM = "qlora-tui"
_TORCH_INDEX = "https://download.pytorch.org/whl/"


class Installer(Enum):
    """What manages the packages of an environment."""

    UV_TOOL = "uv tool"
    PIPX = "pipx"
    PIP = "pip"
    UV = "uv"
    """An environment without pip, as ``uv venv`` makes it."""


def installer() -> Installer:
    """Return what manages the environment of this process."""
    prefix = Path(sys.prefix)
    if (prefix / "uv-receipt.toml").exists():
        return Installer.UV_TOOL
    if (prefix / "pipx_metadata.json").exists():
        return Installer.PIPX
    return Installer.UV if find_spec("pip") is None else Installer.PIP


def install_command(*requirements: str) -> str:
    """Return the command that installs or upgrades packages, such as ``mlflow`` or ``qlora-tui[export]``.

    An environment of uv or pipx is changed through these, and may have no pip.
    """
    of_program = [name for name in requirements if name.partition("[")[0] == PROGRAM] or [PROGRAM]
    others = [name for name in requirements if name not in of_program]
    match installer():
        case Installer.UV_TOOL:
            extra = [word for name in others for word in ("--with", name)]
            words = ["uv", "tool", "install", "--upgrade", *of_program, *extra]
        case Installer.PIPX:
            words = ["pipx", "runpip", PROGRAM, "install", "--upgrade", *requirements]
        case Installer.PIP:
            words = [sys.executable, "-m", "pip", "install", "--upgrade", *requirements]
        case Installer.UV:
            words = ["uv", "pip", "install", "--python", sys.executable, "--upgrade", *requirements]
    return shlex.join(words)


def torch_command(build: str) -> str:
    """Return the command that replaces torch by a build of its own package index, such as ``cu126``."""
    match installer():
        case Installer.UV_TOOL:
            return f"UV_TORCH_BACKEND={build} uv tool install --reinstall {PROGRAM}"
        case Installer.PIPX:
            begin = ["pipx", "runpip", PROGRAM, "install", "--force-reinstall"]
        case Installer.PIP:
            begin = [sys.executable, "-m", "pip", "install", "--force-reinstall"]
        case Installer.UV:
            begin = ["uv", "pip", "install", "--python", sys.executable, "--reinstall-package", "torch"]
    return shlex.join([*begin, "torch", "--index-url", f"{_TORCH_INDEX}{build}"])
