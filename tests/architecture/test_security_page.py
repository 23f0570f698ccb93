"""``SECURITY.md`` names the tests behind each promise; a test that was renamed must be renamed there too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = re.compile(r"\[[^\]]+\]\((?P<file>tests/[\w/]+\.py)\):(?P<tests>(?:\s*`test_\w+`,?)+)")


def linked_tests() -> list[tuple[str, str]]:
    """Each test that the page names: its file and its name."""
    page = (ROOT / "SECURITY.md").read_text()
    return [
        (link["file"], test)
        for link in LINKED.finditer(page)
        for test in re.findall(r"test_\w+", link["tests"])
    ]


@pytest.mark.parametrize(("file", "test"), linked_tests())
def test_every_linked_test_exists(file: str, test: str) -> None:
    defined = re.findall(r"^(?:async )?def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    assert test in defined, f"SECURITY.md names {test} of {file}, which has no such test"


def test_every_promise_is_linked() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    promises = [line for line in page.splitlines() if re.match(r"\| (?!promise|---)", line)]
    assert promises
    assert [line for line in promises if not LINKED.search(line)] == []


def test_every_test_that_the_page_names_is_linked() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    assert set(re.findall(r"`(test_\w+)`", page)) == {test for _, test in linked_tests()}
