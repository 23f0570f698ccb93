"""The optional package that contains llama.cpp: whether it is installed, and how to install it.

Loads neither the package nor its library. ``llama_process.unavailable_because`` tries whether it loads.
"""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

from qlora_tui.installation import install_command

PACKAGE = "llama-cpp-py-sync"
_MODULE = "llama_cpp_py_sync"


def is_installed() -> bool:
    """Return whether the package is installed; imports nothing."""
    return find_spec(_MODULE) is not None


def install_hint() -> str:
    """Return how to install the package, in a sentence, or that there is none for this machine."""
    # The marker of the extra in pyproject.toml.
    if sys.platform == "linux" and platform.machine() != "x86_64":
        return f"{PACKAGE}, which contains it, has no wheel for this machine (Linux {platform.machine()})."
    return f"Install it with `{install_command('qlora-tui[export]')}`."
