"""The pages of ``docs/`` and the top folder: generated ones are current, and every link leads to a file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from docs.generate import pages

ROOT = Path(__file__).parents[2]
WRITTEN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return pages()


@pytest.mark.parametrize("name", ["recipe", "presets", "cli", "keys"])
def test_a_reference_page_is_current(name: str, generated: dict[str, str]) -> None:
    page = f"reference/{name}.md"
    assert (ROOT / "docs" / page).read_text() == generated[page], "out of date: run `make docs`"


@pytest.mark.parametrize("page", ["qlora-tui.1", "glossary.md"])
def test_the_manual_page_and_the_glossary_are_current(page: str, generated: dict[str, str]) -> None:
    assert (ROOT / "docs" / page).read_text() == generated[page], "out of date: run `make docs`"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    linked = LINK.findall(page.read_text())
    assert [target for target in linked if not (page.parent / target).exists()] == []


def test_every_page_is_reachable_from_the_index() -> None:
    docs = ROOT / "docs"
    linked = {(docs / target).resolve() for target in LINK.findall((docs / "README.md").read_text())}
    assert [page for page in docs.glob("**/*.md") if page.name != "README.md" and page not in linked] == []


def test_every_picture_is_shown_somewhere() -> None:
    shown = {Path(target).name for page in WRITTEN for target in LINK.findall(page.read_text())}
    assert [path.name for path in (ROOT / "screenshots").glob("*.svg") if path.name not in shown] == []


def test_every_shipped_preset_is_named_in_the_guide() -> None:
    guide = (ROOT / "docs" / "first-run.md").read_text()
    assert [path.stem for path in (ROOT / "presets").glob("*.toml") if f"`{path.stem}`" not in guide] == []


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


def test_the_package_names_its_version_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
