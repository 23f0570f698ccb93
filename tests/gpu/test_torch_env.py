"""How threads wait is chosen by how busy the machine is, and by the user before that.

Imports of torch's libraries without its compiler.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_tui import paths
from qlora_tui.gpu import torch_env
from qlora_tui.gpu.torch_env import allocator_variables, grows_segments, openmp_wait_policy
from qlora_tui.memory.budget import budget_for
from tests.support.nvml_stub import stub_env


@pytest.mark.parametrize(
    ("busy_percent", "cores", "chosen"),
    [
        (10.0, 2, {"GOMP_SPINCOUNT": "20000"}),
        (50.0, 2, {"OMP_WAIT_POLICY": "PASSIVE"}),
        # One core of sixteen at work is enough to hold up all threads at each meeting.
        (6.25, 16, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_threads_spin_on_an_idle_machine_and_sleep_otherwise(
    monkeypatch: pytest.MonkeyPatch, busy_percent: float, cores: int, chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy_percent)
    monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
    assert openmp_wait_policy({}) == chosen


@pytest.mark.parametrize(
    "own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1"}, {"OMP_NUM_THREADS": "1"}]
)
def test_the_users_own_choice_stands_and_costs_no_look(
    monkeypatch: pytest.MonkeyPatch, own: dict[str, str]
) -> None:
    monkeypatch.setattr(torch_env, "psutil", None)
    assert openmp_wait_policy(own) == {}


def test_bitsandbytes_import_messages_go_to_the_log_only() -> None:
    # Its import takes seconds, so its module's own logger is spoken through without it.
    module = distribution("bitsandbytes").locate_file("bitsandbytes/backends/cpu/ops.py")
    source = Path(str(module)).read_text()
    assert "getLogger(__name__)" in source and "kernels-community" in source
    code = (
        "import logging; from qlora_tui.gpu.torch_env import configure_torch_env; configure_torch_env();"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('no kernel')"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stderr == output.stdout == ""
    assert "no kernel" in paths.log_path().read_text()


def test_the_environment_is_set_before_heavy_imports() -> None:
    code = (
        "import os, sys; from qlora_tui.gpu.torch_env import configure_torch_env;"
        "configure_torch_env({'HF_HUB_OFFLINE': '1'});"
        "assert 'torch' not in sys.modules;"
        "chosen = [n for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT') if n in os.environ];"
        "print(len(chosen), os.environ['HF_HUB_OFFLINE'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "0"}
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert output.stdout.split() == ["1", "0"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, ["1", "0"]), ({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}, ["0", "0"])],
)
def test_cudnn_attention_comes_after_flash_unless_the_user_chose(
    own: dict[str, str], expected: list[str]
) -> None:
    code = (
        "import os; from qlora_tui.gpu.torch_env import configure_torch_env; configure_torch_env();"
        "print(os.environ['TORCH_CUDNN_SDPA_DEPRIORITIZED'], os.environ['TORCH_CUDNN_SDPA_PREFERRED'])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | own
    )
    assert output.stdout.split() == expected


def test_torch_sees_the_chosen_gpu_only() -> None:
    code = (
        "import os; from qlora_tui.gpu.torch_env import configure_torch_env; configure_torch_env();"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    env = os.environ | stub_env("display_first")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert output.stdout.startswith("GPU-4090")


GIB = 2**30
NEW, OLD, GROWING = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"


@pytest.mark.parametrize(
    ("torch", "own", "expected"),
    [
        ("2.13.0+cpu", {}, {NEW: GROWING}),
        ("2.10.0", {}, {NEW: GROWING}),
        ("2.9.1+cu128", {}, {NEW: GROWING, OLD: GROWING}),
        ("2.6.0", {NEW: "backend:native"}, {OLD: "backend:native"}),
        ("2.6.0", {OLD: ""}, {}),
        ("2.13.0", {OLD: "max_split_size_mb:64"}, {}),
        ("2.13.0", {NEW: "max_split_size_mb:64"}, {}),
    ],
)
def test_allocator_settings_use_the_name_this_torch_reads(
    monkeypatch: pytest.MonkeyPatch, torch: str, own: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: torch)
    assert allocator_variables(own) == expected


@pytest.mark.parametrize(
    ("own", "grows"),
    [
        ({}, True),
        ({NEW: "max_split_size_mb:64, expandable_segments:True"}, True),
        ({NEW: "expandable_segments:False"}, False),
        ({NEW: "max_split_size_mb:64"}, False),
        ({OLD: ""}, False),
        ({OLD: "expandable_segments:False", NEW: GROWING}, False),
        ({NEW: "roundup_power2_divisions:[256:1,>:8],expandable_segments:True"}, True),
    ],
)
def test_segments_grow_unless_the_user_said_otherwise(own: dict[str, str], grows: bool) -> None:
    assert grows_segments(own) is grows


@pytest.mark.parametrize(
    ("release", "is_wsl2"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.8.0-45-generic", False),
        ("", False),
    ],
)
def test_wsl2_grows_no_segments_unless_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, is_wsl2: bool
) -> None:
    (tmp_path / "osrelease").write_text(f"{release}\n")
    monkeypatch.setattr(torch_env, "_KERNEL_RELEASE", tmp_path / "osrelease")
    assert (torch_env.is_wsl2(), torch_env.managed_memory_is_safe()) == (is_wsl2, not is_wsl2)
    assert allocator_variables({}) == ({} if is_wsl2 else {NEW: GROWING})
    assert (grows_segments({}), budget_for(None, GIB).device.expandable_segments) == (not is_wsl2,) * 2
    assert allocator_variables({NEW: GROWING}) == {}
    assert grows_segments({NEW: GROWING})


def test_a_kernel_without_microsofts_name_is_known_by_its_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dxg").touch()
    monkeypatch.setattr(torch_env, "_GPU_OF_WINDOWS", tmp_path / "dxg")
    assert torch_env.is_wsl2()


pytestmark = pytest.mark.slow


def test_bitsandbytes_is_imported_without_the_compiler_of_torch() -> None:
    code = (
        "import sys, gc; from qlora_tui.gpu.torch_env import faster_imports\n"
        "with faster_imports(): import bitsandbytes\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"


def test_functions_are_compiled_once_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from qlora_tui.gpu.torch_env import faster_imports

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
