"""The words of the app and what they mean, from ``glossary.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path

from qlora_tui.formatting import capitalize

GLOSSARY: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""Term to meaning."""


def explain(term: str) -> str:
    """Return the meaning as a sentence, without the marks of code."""
    meaning = GLOSSARY[term].replace("`", "")
    return f"{capitalize(meaning)}."
