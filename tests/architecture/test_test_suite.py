"""Rules for the tests themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CPU_CLOCKS = frozenset(("process_time", "process_time_ns", "perf_counter", "perf_counter_ns", "thread_time"))
CLOCKS = CPU_CLOCKS | {"monotonic", "monotonic_ns"}
IMPORTS_TESTS = re.compile(r"^\s*(?:from|import) tests\b|\"tests\.", re.MULTILINE)


@pytest.mark.parametrize("folder", ["qlora_tui", "bench", "screenshots", "docs"])
def test_only_tests_import_tests(folder: str) -> None:
    sources = (ROOT / folder).rglob("*.py")
    assert [str(path) for path in sources if IMPORTS_TESTS.search(path.read_text())] == []


def test_no_assertion_depends_on_a_clock() -> None:
    clocked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Assert) and reads_clock(node.test, CLOCKS))
        or (isinstance(node, ast.Call) and reads_clock(node, CPU_CLOCKS))
    ]
    assert not clocked, "wait for a condition (tests.support.polling), or count (tests.support.counting)"


def reads_clock(tree: ast.AST, clocks: frozenset[str]) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in clocks
        for node in ast.walk(tree)
    )


def test_test_names_have_at_most_ten_words() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and len(node.name.split("_")) > 11
    ] == []
