"""Starting a module of this program in a process of its own, wherever this one was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PYTHONPATH = "PYTHONPATH"
_PACKAGE = str(Path(__file__).parents[1])


def module_argv(module: str, *arguments: str) -> list[str]:
    """This Python on ``module``. ``-P``: a file named torch.py where the user stands is not torch."""
    return [sys.executable, "-P", "-m", module, *arguments]


def subprocess_env() -> dict[str, str]:
    """This process's own, in which ``command`` finds this very package and what it prints comes at once."""
    paths = dict.fromkeys((_PACKAGE, *filter(None, os.environ.get(PYTHONPATH, "").split(os.pathsep))))
    return {**os.environ, PYTHONPATH: os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def user_env() -> dict[str, str]:
    """What ``environment`` adds would lead the user's own programs of Python's astray."""
    return {name: value for name, value in os.environ.items() if name not in (PYTHONPATH, "PYTHONUNBUFFERED")}
