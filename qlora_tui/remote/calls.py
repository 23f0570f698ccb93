"""Functions that are called on the box, if there is one: those that belong to the machine that trains.

Without a box they are what they are. With one they are called there by their import path, with arguments and
result as JSON. Loads nothing of ssh: every reader of runs imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from qlora_tui.errors import UserError

if TYPE_CHECKING:
    from qlora_tui.remote.link import Link

UNREACHABLE = "unreachable"
"""Code of the error for a box that does not answer."""
P = ParamSpec("P")
T = TypeVar("T")
_links: list[Link] = []
"""The link of this process, if it works on a box."""


def current() -> Link | None:
    """Return the link of this process; None if runs train here."""
    return _links[0] if _links else None


def use(link: Link | None) -> None:
    """Work on a box from now on: readers of runs read its copy, and marked functions are called there."""
    _links[:] = [] if link is None else [link]


def refuse_on_box(title: str, command: str) -> None:
    """Raise UserError in an app that works on a box, for what only a command does there.

    Args:
        title: What is refused, in a few words.
        command: The command without ``qlora-tui``: ``export gguf RUN OUT``.
    """
    if (link := current()) is not None:
        raise UserError(
            title,
            what=f"This app shows {link.box.name}, and the result belongs to that machine.",
            fix=f"Use the command: `qlora-tui --host {link.box.name} {command}`.",
        )


def at_box(function: Callable[P, T]) -> Callable[P, T]:
    """Call the function on the box, if there is one: it reads what belongs to the machine that trains."""
    return _marked(function, changes=False)


def at_box_once(function: Callable[P, T]) -> Callable[P, T]:
    """Call the function on the box, if there is one, once for each arguments: they describe what stays there.

    As long as it does not answer, this machine stands in for it.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        link = current()
        if link is None:
            return function(*args, **kwargs)
        key = (function, args, tuple(kwargs.items()))
        if key not in link.kept:
            try:
                link.kept[key] = link.call(function, args, kwargs, changes=False)
            except UserError:
                return function(*args, **kwargs)
        result: T = link.kept[key]
        return result

    return call


def changes_box(function: Callable[P, T]) -> Callable[P, T]:
    """Call the function on the box, if there is one, and once: it changes something there, or is much work.

    Asked again after the line dropped, the box waits for the first call and gives its result.
    """
    return _marked(function, changes=True)


def _marked(function: Callable[P, T], *, changes: bool) -> Callable[P, T]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        link = current()
        if link is None:
            return function(*args, **kwargs)
        return link.call(function, args, kwargs, changes=changes)

    return call
