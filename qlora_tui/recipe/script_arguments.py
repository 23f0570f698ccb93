"""Reads the arguments of function calls from the text of a Python script. The script is never run."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple


class Expression(str):
    """The source text of a value that would be known only by running the script."""

    __slots__ = ()


class Call(NamedTuple):
    """A function call in a script."""

    owner: str
    """Text before the last dot: ``FastLanguageModel``."""
    name: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    """The arguments: plain values, with the script's constants substituted, or an :class:`Expression`."""


def calls_of(text: str, names: Collection[str]) -> Iterator[Call]:
    """Yield the calls of functions with these names, from any module.

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
