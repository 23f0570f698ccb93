"""Imports of torch's libraries without its compiler."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_bitsandbytes_is_imported_without_the_compiler_of_torch() -> None:
    code = (
        "import sys, gc; from qlora_tui.gpu.library_imports import faster_imports\n"
        "with faster_imports(): import bitsandbytes\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"


def test_functions_are_compiled_once_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qlora_tui.gpu.library_imports import faster_imports

    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_now(model: Any, **options: Any) -> Callable[..., int]:
        compiled.append((getattr(model, "__name__", type(model).__name__), options))
        return lambda number: int(model(number)) + 100

    def double(number: int) -> int:
        return 2 * number

    def triple(number: int) -> int:
        return 3 * number

    monkeypatch.setattr(torch, "compile", compile_now)
    frozen = gc.get_freeze_count()
    try:
        with faster_imports():
            doubled = torch.compile(double, dynamic=False)
            tripled = torch.compile(dynamic=True)(triple)
            torch.compile(torch.nn.Identity())
    finally:
        if not frozen:
            gc.unfreeze()
    assert torch.compile is compile_now
    assert compiled == [("Identity", {})]
    assert [doubled(1), doubled(2), tripled(1)] == [102, 104, 103]
    assert compiled == [("Identity", {}), ("double", {"dynamic": False}), ("triple", {"dynamic": True})]
