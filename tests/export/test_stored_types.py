"""Which types a written file's matrices have, and why some are larger."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.export.gguf import export_gguf
from tests.export.export_sources import make_source

pytestmark = pytest.mark.slow


def test_rows_that_no_k_block_fits_are_explained(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    source = make_source(tmp_path, hidden_size=64, intermediate_size=256)
    result = export_gguf(source, "adapter", tmp_path / "out", ["Q4_K_M"])
    types = result.files[0].types
    assert types.counts["Q4_K"] + types.counts.get("Q6_K", 0) == 2  # down_proj of both layers
    assert types.row_lengths == (64,) and types.replaced_count == sum(types.counts.values()) - 2
    assert types.sentence.endswith("rows of 64 are not made of whole blocks of 256")
    assert types.sentence in result.summary


def test_rows_that_fit_need_no_explanation(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    types = export_gguf(source, "adapter", tmp_path / "out", ["Q8_0"]).files[0].types
    assert types.counts == {"Q8_0": 16} and not types.sentence
