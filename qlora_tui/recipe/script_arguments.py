"""The arguments with which a Python script calls functions, read from its text. The script is never run."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple


class Expression(str):
    """The text of a value that only running the script would give."""

    __slots__ = ()


class Call(NamedTuple):
    """One call of a script."""

    owner: str
    """What is before the last dot: ``FastLanguageModel``."""
    name: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    """Values: plain ones, with the script's constants put in, or an :class:`Expression`."""


def calls_of(text: str, names: Collection[str]) -> Iterator[Call]:
    """Yield the calls of functions with these names, whatever module they are of.

    Raises SyntaxError, ValueError, RecursionError or MemoryError if the text is not Python.
    """
    tree = ast.parse(text)
    constants = {
        target.id: _value(node.value, {})
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        if name in names:
            yield Call(
                owner,
                name,
                tuple(_value(argument, constants) for argument in node.args),
                {a.arg: _value(a.value, constants) for a in node.keywords if a.arg is not None},
            )


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    text = ast.unparse(node)
    if text.startswith("torch.") and isinstance(node, ast.Attribute):
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Expression(text)
