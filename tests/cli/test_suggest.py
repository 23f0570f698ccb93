"""``suggest``: prints what it would change, and writes it only if told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.recipe.toml import load
from tests.cli.conftest import Call
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.tui.sample_data import readable_model, tickets

pytestmark = pytest.mark.slow


def test_suggestions_are_for_the_gpu_and_are_written_only_to_a_new_file(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    install_torch(monkeypatch, "12.4")
    recipe = tmp_path / "recipe.toml"
    rows = tickets(tmp_path / "tickets.jsonl", 80)
    words = ["suggest", "--gpu", "1", "--model", readable_model(tmp_path), "--data", str(rows)]
    both = call(words[0], *words[3:], "--set", "training.gpus=2", "--json").json
    found = call(*words, "--json").json
    assert found["samples_are_counted"] and 8 << 30 < found["free_bytes"] < 13 << 30
    assert both["free_bytes"] < 13 << 30, "each GPU holds the model: the smaller one decides"
    length, *others = found["suggestions"]
    assert length["changes"]["data.max_length"] == found["changes"]["data.max_length"] == 512
    assert all(one["reason"] and (one["sources"] or not one["known"]) for one in others)
    shown = call(*words).out
    assert "1,024 → 512" in shown and "Nothing was changed" in shown and "--set data.max_length=512" in shown

    assert "Wrote" in call(*words, "-o", str(recipe)).out
    assert load(recipe)["data"]["max_length"] == 512
    assert "truncates none" in recipe.read_text().splitlines()[0]
    assert call("suggest", str(recipe), "--gpu", "1", "--json").json["changes"] == {}
    assert call(*words, "-o", str(recipe)).code == 2


def test_without_data_there_is_nothing_to_suggest(call: Call, qwen: Path) -> None:
    said = call("suggest", "--model", str(qwen))
    assert said.code == 2 and "--data" in said.err
