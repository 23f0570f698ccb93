"""Version, changelog and tag of a release say the same."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import qlora_tui

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def problem_of(version: str, changelog: str, tag: str) -> str:
    """What keeps this from being released, or with an empty tag from being developed; empty if nothing."""
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    if newest is None or newest[1] != version:
        return f"CHANGELOG.md does not begin with a section {version}"
    if tag and tag != f"v{version}":
        return f"the tag is {tag}, the version {version}"
    if tag and newest[2] == "unreleased":
        return f"the section {version} of CHANGELOG.md has no date"
    return ""


def test_this_version_can_be_released_by_its_tag() -> None:
    tag = os.environ.get("GITHUB_REF_NAME", "") if os.environ.get("GITHUB_REF_TYPE") == "tag" else ""
    assert problem_of(qlora_tui.__version__, CHANGELOG.read_text(), tag) == ""


@pytest.mark.parametrize(
    ("changelog", "tag", "is_right"),
    [
        ("## 1.2.3 (unreleased)\n## 1.2.2 (2026-01-02)", "", True),
        ("## 1.2.3 (2026-02-03)", "v1.2.3", True),
        ("## 1.2.3 (unreleased)", "v1.2.3", False),
        ("## 1.2.3 (2026-02-03)", "v1.2.4", False),
        ("## 1.2.2 (2026-01-02)", "v1.2.3", False),
        ("## Unreleased", "", False),
    ],
)
def test_what_disagrees_is_not_released(changelog: str, tag: str, is_right: bool) -> None:
    assert (problem_of("1.2.3", changelog, tag) == "") is is_right
