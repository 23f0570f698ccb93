"""Records a step on a CPU as a CUDA graph would: kernels and addresses, and no Python.

Replaying calls the recorded operations on the recorded tensors, and writes each result to the tensor that it
had when it was recorded. So a number that Python computed stays what it was, and a result is where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Runs operations and notes them. Raises RuntimeError where one reads a value, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Views and results in place follow their input by themselves.
        is_new = not any(each.untyped_storage().data_ptr() in inputs for each in results)
        self.calls.append((func, args, kwargs, results if is_new else []))
        return result


def record_tape(step: Callable[[], None]) -> Callable[[], None]:
    """Record ``step``; return what replays it."""
    step()
    with TapeRecorder() as tape:
        step()

    def replay() -> None:
        for func, args, kwargs, results in tape.calls:
            again = tree_leaves(func(*args, **kwargs))
            for result, now in zip(
                results, (leaf for leaf in again if isinstance(leaf, Tensor)), strict=False
            ):
                result.copy_(now)

    return replay
