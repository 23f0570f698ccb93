"""Which kernels a model looks for is read from the source of its class in transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlora_tui import installation
from qlora_tui.catalog import optional_kernels
from qlora_tui.catalog.optional_kernels import describe_missing, kernel_packages, missing_kernels

DECORATED = """
@use_kernel_func_from_hub_with_fallback("scan", "mamba_ssm")
def scan(x): ...
"""
GUARDED = """
if is_flash_linear_attention_available():
    from fla.ops import chunk
else:
    chunk = None
if is_mambapy_available():
    from mambapy.pscan import pscan
else:
    pscan = None
if is_accelerate_available():
    from accelerate import hooks

class Mixer:
    def __init__(self, config):
        self.use_mambapy = config.use_mambapy
        self.conv = lazy_load_kernel("causal-conv1d")
"""


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    kernel_packages.cache_clear()


def modules(model_type: str) -> list[str]:
    return sorted(package.module for package in kernel_packages(model_type))


def test_they_are_read_from_the_installed_transformers() -> None:
    assert modules("qwen3_5_text") == modules("qwen3_5") == ["causal_conv1d", "fla"]
    assert modules("lfm2") == ["causal_conv1d"]
    assert modules("falcon_h1") == ["causal_conv1d", "mamba_ssm"]
    assert modules("llama") == modules("gemma3n_text") == modules("no/such") == modules("../llama") == []


@pytest.mark.parametrize(
    ("source", "wanted"), [(DECORATED, ["mamba_ssm"]), (GUARDED, ["causal_conv1d", "fla"])]
)
def test_each_form_of_an_optional_import_counts(
    source: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "configuration_mixed.py").write_text('class A:\n    model_type = "mixed_text"\n')
    (folder / "modeling_mixed.py").write_text(source)
    monkeypatch.setattr(optional_kernels, "_models_folder", lambda: tmp_path)
    assert modules("mixed_text") == wanted
    assert modules("mixed") == []


def test_the_commands_keep_the_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(installation, "version", lambda name: "2.13.0+cu130")
    packages = tuple(optional_kernels.KernelPackage(name) for name in ("fla", "causal_conv1d"))
    text, fix = describe_missing(packages)
    assert "flash-linear-attention and causal-conv1d are not installed" in text
    wheels, _, compiled = fix.partition(" Then ")
    assert "'flash-linear-attention[cuda]' torch==2.13.0 transformers==2.13.0" in wheels
    assert "--no-build-isolation causal-conv1d torch==2.13.0" in compiled and "nvcc" in compiled


@pytest.mark.parametrize(("nvcc", "needs"), [("/usr/bin/nvcc", False), (None, True)])
def test_without_nvcc_the_toolkit_comes_first(
    monkeypatch: pytest.MonkeyPatch, nvcc: str | None, needs: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: nvcc)
    _, fix = describe_missing((optional_kernels.KernelPackage("causal_conv1d"),))
    assert fix.startswith("Install the CUDA toolkit" if needs else "Install with `")


def test_installed_kernels_are_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_packages("qwen3_5_text")
    monkeypatch.setattr(optional_kernels, "find_spec", lambda name: name == "fla" or None)
    assert [package.module for package in missing_kernels("qwen3_5_text")] == ["causal_conv1d"]
