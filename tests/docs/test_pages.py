"""The pages of ``docs/`` and the top folder: generated ones are current, and every link leads to a file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate import pages

ROOT = Path(__file__).parents[2]
WRITTEN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def test_generated_pages_are_current() -> None:
    old = [page for page, text in pages().items() if (ROOT / "docs" / page).read_text() != text]
    assert old == [], "out of date: run `make docs`"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    linked = LINK.findall(page.read_text())
    assert [target for target in linked if not (page.parent / target).exists()] == []


def test_every_setting_that_the_guides_name_exists() -> None:
    recipe = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    sections = dict.fromkeys(re.findall(r"^## `\[(\w+)\]`", recipe, re.MULTILINE))
    named = {
        (section, key)
        for page in ROOT.glob("docs/*.md")
        for section, key in re.findall(r"`(?:--set )?(\w+)\.(\w+)(?:=[^`]*)?`", page.read_text())
        if section in sections
    }
    keys = {
        (section, key)
        for section, body in re.findall(
            r"^## `\[(\w+)\]`\n(.*?)(?=^## |\Z)", recipe, re.MULTILINE | re.DOTALL
        )
        for key in re.findall(r"^### `(\w+)`", body, re.MULTILINE)
    }
    assert named
    assert named - keys == set()
