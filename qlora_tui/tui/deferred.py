"""Calls for Textual's workers that leave no coroutine behind when they are cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, ParamSpec

P = ParamSpec("P")


class DeferredWork(Awaitable[None]):
    """A call of a coroutine function that happens when it is awaited, and not before.

    A worker that is cancelled before its first step, by a later one of its group or as the app quits, would
    leave a coroutine behind that was never awaited, and Python warns of that.
    """

    def __init__(
        self, work: Callable[P, Coroutine[Any, Any, None]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        self._work = partial(work, *args, **kwargs)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._work().__await__()
