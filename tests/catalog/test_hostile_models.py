"""Model files built to exhaust memory or to block: rejected, naming the file and the bound."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.local_models import LocalModel, hub_cache_dir, list_local_models, resolve_model
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.errors import UserError
from tests.catalog.models import TINY, make_cached, make_model

MIB = 1 << 20


def _refusals(folder: Path) -> dict[str, str]:
    models: list[LocalModel] = list_local_models([folder])
    return {model.name: model.refusal.what if model.refusal else "" for model in models}


def test_a_pipe_in_place_of_a_config_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "whole")
    folder = make_model(tmp_path / "piped")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refusals = _refusals(tmp_path)
    assert refusals["whole"] == ""
    assert "config.json: it cannot be read (it is not a regular file)" in refusals["piped"]


def test_a_pipe_in_place_of_a_revision_is_passed_over(tmp_path: Path) -> None:
    snapshot = make_cached(hub_cache_dir(), "org/cached")
    main = snapshot.parents[1] / "refs" / "main"
    main.unlink()
    os.mkfifo(main)
    assert _refusals(tmp_path) == {"org/cached": ""}


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "huge")
    os.truncate(folder / "config.json", 5 * MIB)
    assert "it cannot be read (it is larger than 4 MiB)" in _refusals(tmp_path)["huge"]


@pytest.mark.parametrize("method", ["awq", "mxfp4", ["mxfp4"], {"mxfp4": 1}, 4])
def test_only_known_quantized_weights_are_accepted(tmp_path: Path, method: object) -> None:
    make_model(tmp_path / "stored", TINY | {"quantization_config": {"quant_method": method}})
    assert f"is stored as {method}" in _refusals(tmp_path)["stored"]


def test_a_huge_index_is_refused_unread(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "huge", shards=2)
    os.truncate(folder / "model.safetensors.index.json", 33 * MIB)
    with pytest.raises(UserError) as refused:
        weight_files(folder)
    assert "larger than 32 MiB" in refused.value.what


def test_a_config_of_some_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'{"quantized": ["' + b"a" * 3 * MIB + b'"]}')
    assert load_config(file)["quantized"]


def test_a_huge_header_of_weights_is_refused_unread(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "huge")
    length = 17 * MIB
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"[" * length)
    with pytest.raises(UserError) as refused:
        resolve_model(str(folder))
    assert refused.value.title == "Damaged weights"
    assert "its header is larger than 16 MiB" in refused.value.what
