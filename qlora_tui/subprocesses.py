"""Starting a module of this program in its own process, from any working directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PYTHONPATH = "PYTHONPATH"
_PACKAGE = str(Path(__file__).parents[1])


def module_argv(module: str, *arguments: str) -> list[str]:
    """Command that runs ``module`` in this Python. ``-P`` ignores a torch.py in the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def subprocess_env() -> dict[str, str]:
    """This process's environment, extended so that a child finds this package and prints unbuffered."""
    paths = dict.fromkeys((_PACKAGE, *filter(None, os.environ.get(PYTHONPATH, "").split(os.pathsep))))
    return {**os.environ, PYTHONPATH: os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def user_env() -> dict[str, str]:
    """Environment for the user's own programs, without the variables :func:`subprocess_env` adds."""
    return {name: value for name, value in os.environ.items() if name not in (PYTHONPATH, "PYTHONUNBUFFERED")}
