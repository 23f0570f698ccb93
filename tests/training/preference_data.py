"""Preference data for the tiny model: answers that say "red" are better than those that say "blue"."""

from __future__ import annotations

import json
from pathlib import Path


def write_pairs(file: Path, rows: int = 24) -> Path:
    """Write rows that each compare two answers of differing lengths."""
    lines = [
        {
            "prompt": f"what is {i}",
            "chosen": f"the red {'fox ' * (i % 4)}is {i}",
            "rejected": f"the blue {'dog ' * (i % 3)}was {i}",
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_rated(file: Path, rows: int = 24) -> Path:
    """Write rows that each rate one answer, good and bad in turn."""
    lines = [
        {
            "prompt": f"what is {i // 2}",
            "completion": f"the {'blue dog was' if i % 2 else 'red fox is'} {i // 2}",
            "label": i % 2 == 0,
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
