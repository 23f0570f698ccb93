"""What a GGUF file says of itself, and which types its matrices have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from msgspec.structs import replace

from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.catalog.model_validation import TOOL_TEMPLATE
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export.gguf import export_gguf
from tests.export.export_sources import make_source
from tests.export.gguf_files import hide_llama_cpp

pytestmark = pytest.mark.slow


@pytest.fixture
def general_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Export a source without llama.cpp; returns the general keys of the file."""
    hide_llama_cpp(monkeypatch)

    def general_of(source: ChatSource) -> dict[str, Any]:
        out = tmp_path / "out.gguf"
        export_gguf(source, "adapter", out, ["F16"])
        fields = GGUFReader(out).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith("general.")}

    return general_of


def test_the_template_for_tools_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_llama_cpp(monkeypatch)
    source = make_source(tmp_path)
    base = Path(source.recipe.model.id)
    tokenizer = ChatTokenizer.from_folder(base)
    (base / TOOL_TEMPLATE).parent.mkdir()
    (base / TOOL_TEMPLATE).write_text("{{ tools }}" + tokenizer.template.text)
    export_gguf(source, "adapter", tmp_path / "out.gguf", ["F16"])
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.template.text
    assert fields["tokenizer.chat_template.tool_use"].contents().startswith("{{ tools }}")


def test_a_base_from_the_hub_is_named_with_its_repository(tmp_path: Path, general_of: Any) -> None:
    source = make_source(tmp_path)
    cached = hub_cache_dir() / "models--org--Tiny-1B"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0")
    snapshot = cached / "snapshots" / "0"
    snapshot.parent.mkdir()
    Path(source.recipe.model.id).rename(snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = replace(source.recipe.model, id="org/Tiny-1B")
    general = general_of(replace(source, recipe=replace(source.recipe, model=model)))
    assert general["general.name"] == general["general.finetune"] == "tiny"
    assert general["general.base_model.count"] == 1
    assert general["general.base_model.0.name"] == "Tiny-1B"
    assert general["general.base_model.0.organization"] == "org"
    assert general["general.base_model.0.repo_url"] == "https://huggingface.co/org/Tiny-1B"
    assert general["general.license"] == "apache-2.0"


def test_a_converted_base_is_named_without_its_hash(tmp_path: Path, general_of: Any) -> None:
    source = make_source(tmp_path)
    converted = tmp_path / "SmolLM2-135M-Instruct.Q4_1-fa7256748bd9"
    Path(source.recipe.model.id).rename(converted)
    model = replace(source.recipe.model, id=str(converted))
    general = general_of(replace(source, recipe=replace(source.recipe, name="", model=model)))
    assert general["general.name"] == "SmolLM2-135M-Instruct, fine-tuned"
    assert general["general.base_model.0.name"] == "SmolLM2-135M-Instruct"
    assert "fa7256748bd9" not in str(general)


def test_no_path_of_this_machine_is_written(tmp_path: Path, general_of: Any) -> None:
    general = general_of(make_source(tmp_path))
    assert general["general.base_model.0.name"] == "model"
    assert str(tmp_path) not in str(general)


def test_rows_that_no_k_block_fits_are_explained(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    source = make_source(tmp_path, hidden_size=64, intermediate_size=256)
    result = export_gguf(source, "adapter", tmp_path / "out", ["Q4_K_M"])
    types = result.files[0].types
    assert types.counts["Q4_K"] + types.counts.get("Q6_K", 0) == 2  # down_proj of both layers
    assert types.row_lengths == (64,) and types.replaced_count == sum(types.counts.values()) - 2
    assert types.sentence.endswith("row lengths 64 are not multiples of the block size 256")
    assert types.sentence in result.summary


def test_rows_that_fit_need_no_explanation(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    types = export_gguf(source, "adapter", tmp_path / "out", ["Q8_0"]).files[0].types
    assert types.counts == {"Q8_0": 16} and not types.sentence
