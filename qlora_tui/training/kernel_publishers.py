"""Restricts the compiled kernels that may be loaded from the Hub to one publisher."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

PUBLISHER = "kernels-community"
"""Hugging Face's own account, which publishes flash attention."""


def pin_publisher() -> None:
    """Make transformers load kernels of :data:`PUBLISHER` only; some model families name other publishers."""
    if find_spec("kernels") is None:
        return
    from transformers.integrations import hub_kernels

    load = getattr(hub_kernels, "get_kernel_hub", None)
    if load is not None and not hasattr(load, "pinned"):
        setattr(hub_kernels, "get_kernel_hub", _of_publisher(load))  # noqa: B010  # not in its stubs everywhere


def _of_publisher(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def checked(repo_id: str, *args: Any, **settings: Any) -> Any:
        if repo_id.partition("/")[0] != PUBLISHER:
            raise ImportError(
                f"{repo_id} is not from {PUBLISHER}: kernels from other publishers are not loaded"
            )
        return load(repo_id, *args, **settings)

    setattr(checked, "pinned", True)  # noqa: B010  # a mark on a function
    return checked
