"""Faster imports of torch, transformers, peft and bitsandbytes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any


@contextmanager
def faster_imports() -> Iterator[None]:
    """Import libraries in the body of ``with`` without two kinds of work that nothing needs then.

    bitsandbytes passes four functions, of which training on a GPU calls none, to ``torch.compile`` when it is
    imported. That loads torch's compiler, TorchInductor, which takes over a second. Functions given to
    ``torch.compile`` in the body are compiled at their first call instead.

    Garbage collections go over all modules loaded so far and free nothing: they wait until the end, and then
    leave out what was loaded.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    import torch

    compile_now = torch.compile
    vars(torch)["compile"] = functools.partial(_compile_at_first_call, compile_now)
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_now
        gc.freeze()
        if was_enabled:
            gc.enable()


def _compile_at_first_call(
    compile_now: Callable[..., Any], model: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Return what ``torch.compile`` returns for ``model``; a function is compiled when it is first called."""
    if model is None:
        return functools.partial(_compile_at_first_call, compile_now, **options)
    if not isinstance(model, FunctionType):
        return compile_now(model, **options)  # type: ignore[no-any-return]

    compiled = functools.cache(lambda: compile_now(model, **options))

    @functools.wraps(model)
    def compile_and_call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return compile_and_call
