"""Adapters from elsewhere, whose two files may not agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.checksums import write_checksums
from qlora_tui.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("indices", [{}, {"trainable_token_indices": {"wte": [1, 2]}}, [1, 2, 3]])
def test_token_rows_missing_from_the_config_are_rejected(tmp_path: Path, indices: Any) -> None:
    import torch
    from safetensors.torch import save_file

    from qlora_tui.adapters.deltas import read_deltas

    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(2, 8)}
    save_file(rows, tmp_path / "adapter_model.safetensors")
    config = indices if isinstance(indices, dict) else {"trainable_token_indices": indices}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, **config}))
    with pytest.raises(UserError, match=r"model\.embed_tokens"):
        read_deltas(tmp_path)


def test_an_adapter_that_changed_since_it_was_written_is_refused(tmp_path: Path) -> None:
    from qlora_tui.adapters.deltas import read_deltas

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(100))
    write_checksums(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(99) + b"\1")
    with pytest.raises(UserError, match="damaged") as caught:
        read_deltas(tmp_path)
    assert "adapter_model.safetensors is not what was written" in caught.value.what
