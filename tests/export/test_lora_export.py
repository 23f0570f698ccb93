"""Adapters as GGUF files: llama.cpp computes base and adapter as transformers and peft do."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from qlora_tui.export.adapter_folder import export_adapter_folder
from qlora_tui.export.gguf_file import families
from qlora_tui.export.lora_export import export_lora
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.model_loading import load_base
from tests.export.export_sources import make_source
from tests.export.gguf_files import divergence, logits_of, write_base
from tests.export.test_gguf_families import GEMMA

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

ROWS = {"embed_tokens": [3, 5, 300], "lm_head": [3, 5, 300]}


def peft_model(source: ChatSource) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(source.recipe.model.id, attn_implementation="eager")
    return PeftModel.from_pretrained(base.float(), source.adapters["adapter"]).eval()


def ids_of(model: Any, count: int = 64) -> list[int]:
    return [3, 5, 300, *random.Random(0).choices(range(2, model.config.vocab_size), k=count)]


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"alpha_pattern": {"v_proj": 31, "layers.0.self_attn.k_proj": 1}, "use_rslora": True},
        {"trainable_token_indices": ROWS},
    ],
    ids=str,
)
def test_llama_cpp_applies_an_adapter_as_peft_does(tmp_path: Path, adapter: dict[str, Any]) -> None:
    source = make_source(tmp_path, adapter=adapter)
    out = tmp_path / "lora.gguf"
    proof = export_lora(source, "adapter", out).proof
    assert proof is not None and not proof.problem
    base = write_base(Path(source.recipe.model.id), tmp_path / "base.gguf")
    model = peft_model(source)
    ids = ids_of(model)
    assert divergence(model, logits_of(base, ids, out), ids) < 5e-4
    assert divergence(model, logits_of(base, ids), ids) > 0.05
    with model.disable_adapter():
        assert divergence(model, logits_of(base, ids), ids) < 1e-4


@pytest.mark.parametrize(
    "tokenizer, model_type, config",
    [
        ("smollm2", "phi3", {}),
        ("smollm2", "granite", {}),
        ("smollm2", "qwen3", {"head_dim": 32}),
        ("smollm2", "glm4", {"head_dim": 16}),
        ("gemma", "gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    ],
)
def test_adapters_of_other_families_are_applied_alike(
    tmp_path: Path, tokenizer: str, model_type: str, config: dict[str, Any]
) -> None:
    source = make_source(tmp_path, tokenizer, model_type, **config)
    out = tmp_path / "lora.gguf"
    export_lora(source, "adapter", out)
    base = write_base(Path(source.recipe.model.id), tmp_path / "base.gguf")
    model = peft_model(source)
    ids = ids_of(model)
    assert divergence(model, logits_of(base, ids, out), ids) < 1e-4


@pytest.mark.parametrize(
    "adapter, tied, why",
    [
        ({"use_dora": True}, False, "DoRA"),
        ({"trainable_token_indices": [3, 5]}, True, "token rows"),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, "trained embedding"),
    ],
)
def test_what_a_lora_file_cannot_express_is_refused(
    tmp_path: Path, adapter: dict[str, Any], tied: bool, why: str
) -> None:
    source = make_source(tmp_path, adapter=adapter, tie_word_embeddings=tied)
    with pytest.raises(UserError, match=why) as refused:
        export_lora(source, "adapter", tmp_path / "lora.gguf")
    assert "export gguf" in refused.value.fix
    assert not (tmp_path / "lora.gguf").exists()


def test_weights_that_gguf_lacks_are_not_dropped_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path)
    monkeypatch.setattr(families, "_NOT_TEXT", re.compile(r"model\.layers\.1\."))
    with pytest.raises(UserError, match=r"such as model\.layers\.1\."):
        export_lora(source, "adapter", tmp_path / "lora.gguf")


def test_a_lora_is_compared_on_both_kinds_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(tmp_path, quantization="nf4")
    loaded: list[str] = []

    def load(folder: Path, recipe: Recipe, *arguments: Any, **settings: Any) -> Any:
        loaded.append(recipe.quantization.method)
        return load_base(folder, recipe, *arguments, **settings)

    monkeypatch.setattr("qlora_tui.chat.session.load_base", load)
    result = export_lora(source, "adapter", tmp_path / "lora.gguf")
    assert loaded == ["nf4"], "the 16-bit model may be too large for the GPU"
    assert result.proof and result.on_16_bits
    assert result.proof.divergence < 1e-3 < result.on_16_bits.divergence
    first, second, third, _base = result.summary.splitlines()
    assert "export gguf" in third and not result.on_16_bits.problem
    assert first.startswith("On the NF4 weights of its training, the LoRA answers as your adapter does at ")
    assert second.startswith("On the original 16-bit weights, the LoRA answers as your adapter does at ")


@pytest.mark.parametrize("rank, flag", [(4, ""), (16, ""), (24, " --max-lora-rank 32")])
def test_a_folder_for_vllm_comes_with_its_command(tmp_path: Path, rank: int, flag: str) -> None:
    source = make_source(tmp_path, adapter={"r": rank})
    tools = Path(source.adapters["adapter"]) / "additional_chat_templates/tool_use.jinja"
    tools.parent.mkdir()
    tools.write_text("{{ tools }}")
    written = export_adapter_folder(source, "adapter", tmp_path / "mine")
    names = {file.name for file in (tmp_path / "mine").rglob("*")}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tool_use.jinja"}
    lora = f"--enable-lora --lora-modules mine={tmp_path}/mine"
    assert written.command == f"vllm serve {source.recipe.model.id} {lora}{flag}"


@pytest.mark.parametrize(
    "adapter, why",
    [
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [3, 5]}, "token rows"),
        ({"alpha_pattern": {"v_proj": 31}}, "different ranks or alphas"),
        ({"rank_pattern": {"v_proj": 2}}, "different ranks or alphas"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(tmp_path: Path, adapter: dict[str, Any], why: str) -> None:
    source = make_source(tmp_path, adapter=adapter)
    with pytest.raises(UserError, match="vLLM") as refused:
        export_adapter_folder(source, "adapter", tmp_path / "mine")
    assert why in refused.value.what and "export merge" in refused.value.fix
    assert not (tmp_path / "mine").exists()


def test_without_space_for_the_base_a_lora_is_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    computed: list[str] = []
    written = export_lora(source, "adapter", tmp_path / "lora.gguf", computed.append)
    assert written.proof is None and not any("answers" in words for words in computed)
    assert "Not checked: Not enough disk space: The base model for the comparison" in written.summary
    assert "BASE.gguf in the command is a GGUF file of model, best in BF16 or F16" in written.summary


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_vllm_folder_says_on_which_base_it_is_served(tmp_path: Path, quantization: str) -> None:
    source = make_source(tmp_path, quantization=quantization)
    summary = export_adapter_folder(source, "adapter", tmp_path / "folder").summary
    assert ("trained on NF4 weights: its answers may differ" in summary) == (quantization == "nf4")
    shutil.rmtree(source.recipe.model.id)
    again = export_adapter_folder(source, "adapter", tmp_path / "again")
    assert f"The base {source.recipe.model.id} is missing" in again.summary
