"""Decisions about errors follow their code or class, never their words, which may be reworded any day."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qlora_tui

_ROOT = Path(qlora_tui.__file__).parent
_TEXTS = {"title", "what", "why", "fix"}
_ERRORS = {"error", "problem", "refusal", "failure"}
"""What variables that hold an error or a problem are called."""
_TESTS_OF_TEXT = {"startswith", "endswith", "find", "index", "count", "partition", "rpartition", "split"}


def _is_text(node: ast.expr) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr not in _TEXTS:
        return False
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return owner in _ERRORS


def _decides_by_words(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return any(map(_is_text, (node.left, *node.comparators)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in _TESTS_OF_TEXT and _is_text(node.func.value)
    if isinstance(node, ast.Match):
        return _is_text(node.subject)
    return isinstance(node, ast.Subscript) and (_is_text(node.value) or _is_text(node.slice))


def _decisions(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if _decides_by_words(node)]


@pytest.mark.slow
def test_no_code_decides_by_the_words_of_an_error() -> None:
    by_words = {
        str(path.relative_to(_ROOT)): decisions
        for path in _ROOT.rglob("*.py")
        if (decisions := _decisions(path.read_text()))
    }
    assert by_words == {}


@pytest.mark.parametrize(
    "source",
    [
        'error.title == "No such row"',
        'self.problem.fix.startswith("Map")',
        '"skip" in problem.fix',
        'model.refusal.fix.partition(". ")[0]',
        "seen[problem.title]",
    ],
)
def test_such_a_decision_is_found(source: str) -> None:
    assert len(_decisions(source)) == 1
