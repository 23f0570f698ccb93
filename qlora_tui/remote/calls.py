"""Functions that are called on the box, if there is one: those that belong to the machine that trains.

Without a box they are what they are. With one they are called there by their import path, with arguments and
result as JSON. Loads nothing of ssh: every reader of runs imports this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from qlora_tui.remote.link import Link

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


def at_box(function: Callable[P, T]) -> Callable[P, T]:
    """Call the function on the box, if there is one: it reads what belongs to the machine that trains."""
    return _marked(function, changes=False)


def changes_box(function: Callable[P, T]) -> Callable[P, T]:
    """Call the function on the box, if there is one, and exactly once: it changes something there."""
    return _marked(function, changes=True)


def _marked(function: Callable[P, T], *, changes: bool) -> Callable[P, T]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        link = current()
        if link is None:
            return function(*args, **kwargs)
        return link.call(function, args, kwargs, changes=changes)

    return call
