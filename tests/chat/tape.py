"""Records a step on a CPU as a CUDA graph would: kernels and addresses, and no Python.

Replaying calls the recorded operations on the recorded tensors, and writes each result to the tensor that it
had when it was recorded. So a number that Python computed stays what it was, and a result is where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REFUSED = "operation not permitted when stream is capturing\nand more lines"
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
"""What torch does without an operation where a tensor is on the CPU."""
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)


class _Copies(TorchFunctionMode):
    """Raises RuntimeError where values would be copied between GPU and CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        words = [each for each in (*args, *kwargs.values()) if isinstance(each, str)]
        to_cpu = func is Tensor.to and "cpu" in words
        if func in _READS or to_cpu or (func in _FROM_HOST and not _stays_on_host(args, kwargs)):
            raise RuntimeError(_REFUSED)
        return func(*args, **kwargs)


def _stays_on_host(args: Any, kwargs: Any) -> bool:
    """Return whether a tensor that is created is a number on the CPU, which kernels take as an argument."""
    return isinstance(args[0], int | float) and kwargs.get("device") is None


class TapeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Runs operations and notes them. Raises RuntimeError where one needs a value, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _needs_values(func, args, kwargs or {}):
            raise RuntimeError(_REFUSED)
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


def _needs_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether the CPU has to know values of tensors to go on after an operation."""
    if "index" in func.name():
        # With places the shape is that of these, with a mask it depends on its values.
        return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1]))
    return not _NEEDS_VALUES.isdisjoint(func.tags) and kwargs.get("output_size") is None


def record_tape(step: Callable[[], None]) -> Callable[[], None]:
    """Record ``step``; return what replays it."""
    step()
    with _Copies(), TapeRecorder() as tape:
        step()

    def replay() -> None:
        for func, args, kwargs, results in tape.calls:
            again = tree_leaves(func(*args, **kwargs))
            for result, now in zip(
                results, (leaf for leaf in again if isinstance(leaf, Tensor)), strict=False
            ):
                result.copy_(now)

    return replay
