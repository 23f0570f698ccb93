"""A merged model's logits against those of base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from tests.chat.adapters import make_adapter

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}])
def test_a_right_merge_answers_as_the_adapter(
    dtype: str, config: dict[str, Any], tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.export.merge import merge

    source = with_adapter(tiny_source, tmp_path, dtype, **config)
    check = merge(source, "adapter", tmp_path / "out", base_name="original").check
    assert check is not None and check.agrees, check
    assert check.same_choices >= check.tokens - 1 and check.noise < 0.1


def test_a_wrong_merge_is_not_left_under_its_name(
    tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tui.adapters.deltas import LoraDelta
    from qlora_tui.export.merge import merge

    source = with_adapter(tiny_source, tmp_path, "bfloat16")
    monkeypatch.setattr(LoraDelta, "change", lambda self: self.up.float() @ self.down.float())
    with pytest.raises(UserError, match="does not answer like the adapter") as refused:
        merge(source, "adapter", tmp_path / "out" / "model", base_name="original")
    assert "Its logits differ" in refused.value.what
    assert not list((tmp_path / "out").iterdir())


def test_too_little_memory_leaves_the_merge_unchecked(
    tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    from qlora_tui.export.merge import verify_merge

    class Full:
        available = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    assert "1 MiB are free" in str(verify_merge(tiny_source, "adapter", Path(tiny_source.recipe.model.id)))


def with_adapter(source: ChatSource, folder: Path, dtype: str, **config: Any) -> ChatSource:
    """The tiny model stored in ``dtype``, with an adapter that changes it."""
    import torch

    from tests.training.tiny_model import make_tiny_model

    model = make_tiny_model(folder / "model")
    if dtype != "float32":
        store_as(model, getattr(torch, dtype))
    adapter = str(make_adapter(model, folder / "adapter", **config))
    recipe = replace(source.recipe, model=replace(source.recipe.model, id=str(model)))
    return replace(source, recipe=recipe, adapters={"adapter": adapter})


def store_as(folder: Path, dtype: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
