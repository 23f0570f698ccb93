"""Decorators for functions that read or change the machine that trains.

Without a box, a decorated function runs on this machine. With a box, it is called there by its import path,
with arguments and result as JSON. This module does not import the ssh modules, because every reader of runs
imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from qlora_tui.errors import UserError

if TYPE_CHECKING:
    from qlora_tui.remote.link import Link

UNREACHABLE = "unreachable"
"""Code of the error for a box that does not respond."""
P = ParamSpec("P")
T = TypeVar("T")
_links: list[Link] = []
"""The link of this process, if it works on a box; at most one."""


def current() -> Link | None:
    """Return the link of this process; None if runs train on this machine."""
    return _links[0] if _links else None


def use(link: Link | None) -> None:
    """From now on, call decorated functions on the box of ``link``, or on this machine if it is None."""
    _links[:] = [] if link is None else [link]


def refuse_on_box(title: str, command: str) -> None:
    """Raise UserError if the app works on a box, for an action that is then available only as a command.

    Args:
        title: Title of the error, such as ``Sweeps cannot be started from here``.
        command: The command without ``qlora-tui``, such as ``export gguf RUN OUT``.
    """
    if (link := current()) is not None:
        raise UserError(
            title,
            what=f"The app is connected to {link.box.name}. On a remote machine, this action is available "
            f"only from the command line.",
            fix=f"Use this command: `qlora-tui --host {link.box.name} {command}`.",
        )


def at_box(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that inspects the machine that trains: it is called on the box, if there is one."""
    return _marked(function, changes=False)


def at_box_once(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that always returns the same result for the same arguments.

    If there is a box, the function is called there, and the result is cached. If that fails, for example
    because the box does not respond, the function runs on this machine, and the result is not cached.
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
    """Decorate a function that changes something or is expensive: it is called on the box exactly once, if
    there is one.

    If the request is repeated after the connection dropped, the box returns the result of the first call.
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
