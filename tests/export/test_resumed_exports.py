"""Exports that continue what an interrupted one has completed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from qlora_tui.catalog.gguf import LADDER
from qlora_tui.chat.adapter_deltas import LoraDelta
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.session import ChatSession
from qlora_tui.drafts import draft_path
from qlora_tui.errors import UserError
from qlora_tui.export import gguf_export
from qlora_tui.export.export_key import export_key
from qlora_tui.export.gguf_export import export_gguf
from qlora_tui.export.merge import merge
from qlora_tui.export.merged_weights import MergedWeights
from tests.export.export_sources import make_source

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ChatSource:
    return make_source(tmp_path_factory.mktemp("source"), quantization="nf4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ChatSource:
    """A source whose base is not quantized, so that there is no choice of base weights."""
    return make_source(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of an export was done."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def counted(*arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            return whole(*arguments, **settings)

        monkeypatch.setattr(owner, name, counted)

    count(ChatSession, "head_inputs")
    count(MergedWeights, "_read")
    count(LoraDelta, "apply_to")
    count(gguf_export, "quantize")
    count(gguf_export, "prove")
    return calls


def interrupt(words: str, said: str) -> None:
    if words in said:
        raise KeyboardInterrupt


def interrupted(export: Callable[..., object], words: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        export(on_status=partial(interrupt, words))


def test_every_part_of_a_gguf_export_is_done_once(
    source: ChatSource, tmp_path: Path, calls: Counter[str]
) -> None:
    out = tmp_path / "out.gguf"
    export = partial(export_gguf, source, "adapter", out, ["Q4_K_M"])
    whole, proof = export().files[0].proof, out.read_bytes()
    expected = dict(calls)
    out.unlink()
    calls.clear()
    for words in (
        "Computing the trained model's answers to compare with: row 3 of",
        "16-bit base weights with its training: row",
        "Writing BF16: 50 %",
        "what the BF16 file answers: row 1 of",
        "Quantizing",
        "what the Q4_K_M file answers: row 1 of",
    ):
        interrupted(export, words)
        assert not out.exists() and draft_path(out).exists()
    result = export()
    assert out.read_bytes() == proof and result.files[0].proof == whole
    assert not draft_path(out).exists() and result.base.original_divergence
    again = {name: calls[name] - count for name, count in expected.items()}
    # What was interrupted is done again: a row of the base's choice, a tensor, each proof.
    assert again["quantize"] == 0 and again["prove"] == 2
    assert 0 <= again["_read"] <= 1 and 0 <= again["head_inputs"] <= 2


def test_a_merge_changes_each_weight_once(source: ChatSource, tmp_path: Path, calls: Counter[str]) -> None:
    out = tmp_path / "out"
    export = partial(merge, source, "adapter", out)
    export()
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    expected = dict(calls)
    shutil.rmtree(out)
    calls.clear()
    apply_to = LoraDelta.apply_to

    def stop(self: LoraDelta, weight: Any) -> Any:
        if calls["apply_to"] == 4:
            raise KeyboardInterrupt
        return apply_to(self, weight)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LoraDelta, "apply_to", stop)
        export()
    export()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert dict(calls) == expected and calls["apply_to"] > 8


@pytest.mark.parametrize(("form", "place"), [("merge", 0.0), ("merge", 0.3), ("merge", 0.999), ("gguf", 0.6)])
def test_what_was_damaged_meanwhile_is_written_again(
    plain: ChatSource, tmp_path: Path, form: str, place: float
) -> None:
    out = tmp_path / "out.gguf"
    if form == "merge":
        export: Callable[..., object] = partial(merge, plain, "adapter", out)
        export()
        shutil.move(out, tmp_path / "whole")
        file, words = "model/model.safetensors", "Comparing the merged model"
    else:
        export = partial(export_gguf, plain, "adapter", out, ["F16"])
        export()
        shutil.move(out, tmp_path / "whole")
        file, words = "F16.gguf", "Asking llama.cpp"
    interrupted(export, words)
    partial_file = draft_path(out) / "files" / file
    data = bytearray(partial_file.read_bytes())
    data[int(place * len(data))] ^= 1
    partial_file.write_bytes(data)
    export()
    if form == "merge":
        name = "model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    else:
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_ladder_tries_no_type_twice(plain: ChatSource, tmp_path: Path, calls: Counter[str]) -> None:
    out = tmp_path / "out.gguf"
    export = partial(export_gguf, plain, "adapter", out, ["auto"], within=1e-9)
    interrupted(export, "Trying Q5_K_M")
    proved = calls["prove"]
    assert not list((draft_path(out) / "files").glob("Q[234]*.gguf"))
    with pytest.raises(UserError, match="No type is within the bound"):
        export()
    # Each type, and the 16-bit file first.
    assert proved == 3 and calls["prove"] == 1 + len(LADDER) and not draft_path(out).exists()


def test_the_key_has_all_that_files_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path)
    adapter, model = Path(source.adapters["adapter"]), Path(source.recipe.model.id)
    keys = [export_key(source, "adapter", 1), export_key(source, "adapter", 2)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unrelated").touch()
    assert keys[0] == export_key(source, "adapter", 1)
    recipe = replace(source.recipe, name="other")
    keys.append(export_key(replace(source, recipe=recipe), "adapter", 1))
    for file in (adapter / "adapter_config.json", model / "config.json", tmp_path / "rows.jsonl"):
        file.write_text(file.read_text() + "\n")
        keys.append(export_key(source, "adapter", 1))
    os.utime(model / "model.safetensors", (1, 1))
    keys.append(export_key(source, "adapter", 1))
    monkeypatch.setattr("qlora_tui.export.export_key.__version__", "0")
    keys.append(export_key(source, "adapter", 1))
    assert len(set(keys)) == len(keys) == 8


def test_another_option_starts_from_nothing(plain: ChatSource, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    interrupted(partial(export_gguf, plain, "adapter", out, ["F16"]), "Asking llama.cpp")
    (draft_path(out) / "files" / "marker").touch()
    said: list[str] = []
    export_gguf(plain, "adapter", out, ["F16"], within=5.0, on_status=said.append)
    assert any(words.startswith("Writing F16") for words in said) and not draft_path(out).exists()
