"""The pages of ``docs/`` and the top folder: generated ones are current, and what they name exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from bench.model_types.outcome import Outcome
from docs.generate import pages

ROOT = Path(__file__).parents[2]
WRITTEN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINKED = re.compile(r"\[[^\]]+\]\((?P<file>tests/[\w/]+\.py)\):(?P<tests>(?:\s*`test_\w+`,?)+)")
"""Tests behind a promise of ``SECURITY.md``."""
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


def test_generated_pages_are_current() -> None:
    old = [page for page, text in pages().items() if (ROOT / "docs" / page).read_text() != text]
    assert old == [], "out of date: run `make docs`"


def test_every_link_leads_to_a_file() -> None:
    linked = [(page, target) for page in WRITTEN for target in LINK.findall(page.read_text())]
    assert linked and [link for link in linked if not (link[0].parent / link[1]).exists()] == []


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


def walked_types() -> Outcome:
    return msgspec.json.decode((ROOT / "docs/reference/models.json").read_bytes(), type=Outcome)


def test_the_readme_counts_the_types_that_train() -> None:
    verdicts = Counter(each.verdict for each in walked_types().types)
    lines = (ROOT / "README.md").read_text().splitlines()
    row = next(line for line in lines if "reference/models.md" in line)
    counts = [int(number) for number in re.findall(r"\d+", row)]
    assert counts == [verdicts.total(), verdicts["trained"], verdicts["refused"]]


@pytest.mark.slow
def test_no_type_is_missing() -> None:
    from bench.model_types.processes import all_types

    assert [each.model_type for each in walked_types().types] == all_types()


def linked_tests() -> list[tuple[str, str]]:
    """Each test that ``SECURITY.md`` names: its file and its name."""
    page = (ROOT / "SECURITY.md").read_text()
    return [
        (link["file"], test)
        for link in LINKED.finditer(page)
        for test in re.findall(r"test_\w+", link["tests"])
    ]


def test_every_linked_test_exists() -> None:
    linked = linked_tests()
    defined = {
        file: re.findall(r"^(?:async )?def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        for file in {file for file, _ in linked}
    }
    assert linked and [each for each in linked if each[1] not in defined[each[0]]] == []


def test_every_promise_is_linked() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    promises = [line for line in page.splitlines() if re.match(r"\| (?!promise|---)", line)]
    assert promises
    assert [line for line in promises if not LINKED.search(line)] == []


def test_every_test_that_the_page_names_is_linked() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert set(re.findall(r"`(test_\w+)`", page)) == {test for _, test in linked_tests()}
