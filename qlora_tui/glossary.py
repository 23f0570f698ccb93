"""The terms of the app and their meanings, from ``glossary.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path

from qlora_tui.formatting import capitalize

GLOSSARY: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
"""Meaning of each term."""


def explain(term: str) -> str:
    """Return the meaning of a term as a sentence, without code marks."""
    meaning = GLOSSARY[term].replace("`", "")
    return f"{capitalize(meaning)}."
