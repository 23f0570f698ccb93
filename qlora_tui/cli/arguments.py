"""Argument types. Imports nothing, since starting the app loads this module too."""

from __future__ import annotations

import argparse

GPU_GIB_HELP = "estimate for a GPU with this many GiB of memory"
"""Help of ``--gpu-gib``."""
GPU_HELP = "GPU to use: its number, UUID or a part of its name (see nvidia-smi -L), auto, or cpu"
"""Help of ``--gpu``."""


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("it must be a whole number above 0")
    return int(text)


def whole_number(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it must be a whole number, 0 or more")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a positive number, such as a size in GiB."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("it must be a size above 0, in GiB")
    return value
