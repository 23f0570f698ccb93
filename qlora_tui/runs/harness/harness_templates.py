"""Templates of task files: checked when the file is read, and rendered in jinja2's sandbox."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class UnsafeTemplateError(ValueError):
    """A template is no jinja2, or reaches for what the sandbox hides."""


def sandbox() -> ImmutableSandboxedEnvironment:
    """The environment that renders templates of tasks: lm-eval's, in a sandbox that changes nothing."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


def check_template(text: str) -> None:
    """Check a template without rendering it.

    Raises:
        UnsafeTemplateError: it cannot be parsed, loads another template, or reads a name, attribute or key
            that begins with an underscore.
    """
    import jinja2
    from jinja2 import nodes

    try:
        tree = sandbox().parse(text)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UnsafeTemplateError(f"it is no jinja2: {error}") from error
    if next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None) is not None:
        raise UnsafeTemplateError("it loads another template")
    names: list[Any] = [node.attr for node in tree.find_all(nodes.Getattr)]
    names += [node.name for node in tree.find_all(nodes.Name)]
    indices = [node.arg for node in tree.find_all(nodes.Getitem)]
    names += [index.value for index in indices if isinstance(index, nodes.Const)]
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise UnsafeTemplateError(f"it reads {name!r}, which begins with an underscore")


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)
