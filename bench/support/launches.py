"""Counts the operations of a step that launch a kernel on a GPU, on a machine without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = ("aten::empty", "aten::detach", "aten::_unsafe_view", "aten::new_empty", "aten::empty_like")
"""Operations that only create or relabel a tensor."""


class LaunchCounter(TorchDispatchMode):
    """Counts operations while it is active, by name. Views launch nothing.

    One operation is one launch here; a few, such as the product of a batch of matrices, may be more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.by_name: Counter[str] = Counter()
        self._is_paused = False

    @property
    def total(self) -> int:
        """All launches so far."""
        return self.by_name.total()

    @contextmanager
    def counted_as(self, name: str) -> Iterator[None]:
        """Count what is called inside as one kernel of this name."""
        self.by_name[name] += 1
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name: str = func._schema.name
        if not self._is_paused and name not in _NO_KERNEL and not _is_view(func):
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether an operation returns its input under another shape."""
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)
