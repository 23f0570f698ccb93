"""Rules for the tests themselves."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.test_imports import HEAVY
from tests.conftest import ALL_SLOW

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CPU_CLOCKS = frozenset(("process_time", "process_time_ns", "perf_counter", "perf_counter_ns", "thread_time"))
CLOCKS = CPU_CLOCKS | {"monotonic", "monotonic_ns"}
NAMES_CLOCK = re.compile("|".join(CLOCKS))
IMPORT = re.compile(r"^(?:from ([\w.]+) import (\([^)]*\)|[^\n(]*)|import ([\w.]+))", re.MULTILINE)
IMPORTS_TESTS = re.compile(r"^\s*(?:from|import) tests\b|\"tests\.", re.MULTILINE)


@pytest.mark.parametrize("folder", ["qlora_tui", "bench", "screenshots", "docs"])
def test_only_tests_import_tests(folder: str) -> None:
    sources = (ROOT / folder).rglob("*.py")
    assert [str(path) for path in sources if IMPORTS_TESTS.search(path.read_text())] == []


def test_no_assertion_depends_on_a_clock() -> None:
    sources = [(path, source) for path in TESTS if NAMES_CLOCK.search(source := path.read_text())]
    clocked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, source in sources
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Assert) and reads_clock(node.test, CLOCKS))
        or (isinstance(node, ast.Call) and reads_clock(node, CPU_CLOCKS))
    ]
    assert not clocked, "wait for a condition (tests.support.polling), or count (tests.support.counting)"


def reads_clock(tree: ast.AST, clocks: frozenset[str]) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in clocks
        for node in ast.walk(tree)
    )


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a module loads when it is imported, as far as it is named at the start of a line."""
    for package, names, module in IMPORT.findall(path.read_text()):
        yield package or module
        yield from (f"{package}.{name}" for name in re.findall(r"\w+", names))


def test_modules_of_fast_tests_load_no_ml_library() -> None:
    """Every worker loads all of them, and these libraries take as long as a thousand tests."""
    loaded: dict[str, set[str]] = defaultdict(set)
    for folder in ("qlora_tui", "tests", "bench", "docs", "screenshots"):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            loaded[name] = {name.rpartition(".")[0], *imports_of(path)}

    def chain(module: str, seen: set[str]) -> str:
        """How a module reaches a library; empty where it reaches none."""
        for other in loaded[module] - seen:
            if other.partition(".")[0] in HEAVY:
                return f"{module} > {other}"
            seen.add(other)
            if other in loaded and (rest := chain(other, seen)):
                return f"{module} > {rest}"
        return ""

    tests = [
        path for path in TESTS if path.name.startswith("test_") and not ALL_SLOW.search(path.read_text())
    ]
    fast = [*tests, *(path for path in TESTS if path.name == "conftest.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in fast]
    assert not [way for module in modules if (way := chain(module, {module}))], (
        "import it inside functions, or mark all tests of the module slow: pytestmark"
    )
