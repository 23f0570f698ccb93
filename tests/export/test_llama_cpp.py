"""The package that carries llama.cpp: what the bindings take from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_tui.catalog.gguf_file_types import FILE_TYPES, needs_llama_cpp
from qlora_tui.errors import UserError
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.llama_cpp import bindings, client
from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError
from qlora_tui.export.llama_cpp.client import PACKAGE, LlamaFile, install_hint, quantize
from qlora_tui.export.reference import kl_divergence
from qlora_tui.installation import install_command
from tests.export.export_sources import make_source
from tests.export.gguf_files import logits_of, write_base

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

FUNCTIONS = {
    "llama_backend_init", "llama_batch_free", "llama_batch_init",
    "llama_context_default_params", "llama_decode", "llama_free", "llama_get_logits_ith", "llama_get_memory",
    "llama_init_from_model", "llama_memory_clear", "llama_model_chat_template", "llama_model_default_params",
    "llama_model_free", "llama_model_get_vocab", "llama_model_load_from_file", "llama_model_quantize",
    "llama_model_quantize_default_params", "llama_tokenize", "llama_vocab_bos",
    "llama_vocab_get_add_bos", "llama_vocab_get_text", "llama_vocab_is_eog", "llama_vocab_n_tokens",
}  # fmt: skip
CHANGED = (
    f"A release of {PACKAGE} changed its generated bindings, which are private to it. Compare them with "
    "include/llama.h of its llama.cpp, adapt qlora_tui/export/llama_cpp/bindings.py, and raise the lower "
    "bound in pyproject.toml; until then, set an upper bound there."
)


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("3", 3), ("0", 8), ("", 8), ("4,2", 8)])
def test_openmp_limits_the_threads_of_llama_cpp(
    monkeypatch: pytest.MonkeyPatch, limit: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert bindings.thread_count() == threads


def test_the_generated_bindings_are_as_they_were() -> None:
    from llama_cpp_py_sync import _cffi_bindings as generated

    for name in ("get_ffi", "get_lib"):
        assert hasattr(generated, name), CHANGED
    library = generated.get_lib()
    missing = [name for name in FUNCTIONS if not hasattr(library, name)]
    assert not missing, f"{missing}: {CHANGED}"
    types = [f"LLAMA_FTYPE_MOSTLY_{kind}" for kind in filter(needs_llama_cpp, FILE_TYPES)]
    names = [*types, "LLAMA_FLASH_ATTN_TYPE_DISABLED"]
    assert not [name for name in names if not hasattr(library, name)], CHANGED
    used = Path(bindings.__file__).read_text()
    assert all(name in used for name in FUNCTIONS), "FUNCTIONS above lists what bindings.py uses"


@pytest.mark.parametrize("part", ["get_lib", "get_ffi"])
def test_changed_bindings_are_named(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp_py_sync import _cffi_bindings as generated

    monkeypatch.delattr(generated, part)
    with pytest.raises(LlamaCppError, match=f"{PACKAGE} could not be loaded"):
        LlamaCpp()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="could not be quantized"):
        quantize(str(tmp_path / "no.gguf"), str(tmp_path / "out.gguf"), "Q4_K_M")
    with pytest.raises(UserError, match="could not run the GGUF file") as failed:
        LlamaFile(str(tmp_path / "no.gguf"), 8)
    assert "no.gguf" in failed.value.what


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"llama\.cpp is not installed") as missing:
        quantize("a", "b", "Q4_K_M")
    assert install_command("qlora-tui[export]") in missing.value.fix


@pytest.fixture
def broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose library does not load."""
    package = tmp_path / "llama_cpp_py_sync"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libllama.so: invalid ELF header')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    client.unavailable_because.cache_clear()
    yield
    client.unavailable_because.cache_clear()


@pytest.mark.usefixtures("broken_package")
def test_a_library_that_does_not_load_leaves_files_unchecked(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    with pytest.raises(UserError, match="not available") as refused:
        export_gguf(source, "adapter", tmp_path / "out.gguf", ["Q4_K_M"])
    assert "invalid ELF header" in refused.value.why
    summary = export_gguf(source, "adapter", tmp_path / "out.gguf", ["Q8_0"]).summary
    assert "Not checked: " in summary and "invalid ELF header" in summary


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_a_row_is_computed_in_parts(tmp_path: Path, at_once: int) -> None:
    file = write_base(Path(make_source(tmp_path).recipe.model.id), tmp_path / "base.gguf")
    ids, positions = list(range(5, 55)), [3, 4, *range(20, 50)]
    whole = torch.from_numpy(logits_of(file, ids)[positions]).log_softmax(-1)
    model = LlamaFile(str(file), len(ids), exact=True)
    parts = [torch.from_numpy(part.copy()) for part in model.logits(ids, positions, at_once)]
    model.close()
    assert max(map(len, parts)) <= at_once
    # Its kernels for one token round otherwise.
    assert kl_divergence(whole, torch.cat(parts).log_softmax(-1)).max() < 1e-5


def test_a_machine_without_a_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "no wheel for this machine (Linux aarch64)" in install_hint()
