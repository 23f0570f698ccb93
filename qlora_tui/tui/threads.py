"""Long work in a thread that ends with the worker that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event
from typing import Any, TypeVar

T = TypeVar("T")


async def run_stoppable(function: Callable[..., T], *arguments: Any) -> T:
    """Run ``function`` in a thread, and return its result.

    Its argument ``should_stop`` returns true once this call is canceled: leaving the app cancels a worker,
    but not its thread, for whose end the app would wait.
    """
    stop = Event()
    try:
        return await asyncio.to_thread(function, *arguments, should_stop=stop.is_set)
    finally:
        stop.set()
