"""Rules for the tests themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTS_TESTS = re.compile(r"^\s*(?:from|import) tests\b|\"tests\.", re.MULTILINE)


@pytest.mark.parametrize("folder", ["qlora_tui", "bench", "screenshots", "docs"])
def test_only_tests_import_tests(folder: str) -> None:
    sources = (ROOT / folder).rglob("*.py")
    assert [str(path) for path in sources if IMPORTS_TESTS.search(path.read_text())] == []
