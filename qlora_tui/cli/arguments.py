"""Types of arguments. Imports nothing, since the app's start passes here too."""

from __future__ import annotations

import argparse


def positive(text: str) -> float:
    """A size above nothing, in GiB."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("it must be a size above 0, in GiB")
    return value
