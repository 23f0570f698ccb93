"""Merged models, against peft's own merge and against base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from tests.chat.adapters import make_adapter
from tests.export.export_sources import make_source

pytestmark = pytest.mark.slow


def merged_by_peft(model: Path, adapter: str) -> dict[str, Any]:
    import transformers
    from peft import PeftModel

    library: Any = transformers
    base = library.AutoModelForCausalLM.from_pretrained(model)
    tuned: Any = PeftModel.from_pretrained(base, adapter)
    return dict(tuned.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"v_proj": 32}},
        {"trainable_token_indices": {"embed_tokens": [1, 2, 300], "lm_head": [1, 2, 300]}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_a_merged_model_has_the_weights_that_peft_merges(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path, config: dict[str, Any]
) -> None:
    import torch
    import transformers

    from qlora_tui.export.merge import merge

    adapter = str(make_adapter(tiny_model, tmp_path / "adapter", **config))
    source = msgspec.structs.replace(tiny_source, adapters={"adapter": adapter})
    statuses: list[str] = []
    merged = merge(source, "adapter", tmp_path / "out", statuses.append, base_name="original")
    library: Any = transformers
    ours = library.AutoModelForCausalLM.from_pretrained(merged.folder).state_dict()
    expected = merged_by_peft(tiny_model, adapter)
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
    more = config.get("trainable_token_indices", config.get("modules_to_save", ()))
    assert merged.changed_weights == 2 * 7 + len(more)
    assert statuses[0] == "Merging model.safetensors (1 of 1)" and len(statuses) == 2


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [1, 2, 300]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_a_tied_head_stored_separately_is_merged_too(
    tiny_source: ChatSource, tmp_path: Path, config: dict[str, Any]
) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from qlora_tui.export.merge import merge
    from tests.training.tiny_model import make_tiny_model

    model = make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    held = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(held, model / "model.safetensors", {"format": "pt"})
    adapter = str(make_adapter(model, tmp_path / "adapter", **config))
    recipe = msgspec.structs.replace(
        tiny_source.recipe, model=msgspec.structs.replace(tiny_source.recipe.model, id=str(model))
    )
    source = msgspec.structs.replace(tiny_source, recipe=recipe, adapters={"adapter": adapter})
    library: Any = transformers
    ours = library.AutoModelForCausalLM.from_pretrained(
        merge(source, "adapter", tmp_path / "out", base_name="original").folder
    )
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    expected = merged_by_peft(model, adapter)["model.embed_tokens.weight"]
    torch.testing.assert_close(ours.lm_head.weight.detach(), expected)


def test_a_model_in_several_files_is_merged_file_by_file(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path
) -> None:
    import torch
    import transformers

    from qlora_tui.export.merge import merge

    library: Any = transformers
    shards = tmp_path / "shards"
    shutil.copytree(tiny_model, shards, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = library.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    whole.save_pretrained(shards, max_shard_size="100KB")
    recipe = msgspec.structs.replace(
        tiny_source.recipe, model=msgspec.structs.replace(tiny_source.recipe.model, id=str(shards))
    )
    source = msgspec.structs.replace(tiny_source, recipe=recipe)
    merged = merge(source, "adapter", tmp_path / "out", base_name="original")
    assert len(list(Path(merged.folder).glob("*.safetensors"))) > 1
    ours = library.AutoModelForCausalLM.from_pretrained(merged.folder, dtype="auto").state_dict()
    for name, weight in merged_by_peft(tiny_model, source.adapters["adapter"]).items():
        assert ours[name].dtype == torch.bfloat16
        torch.testing.assert_close(ours[name].float(), weight, rtol=2e-2, atol=1e-2)


def test_the_folder_has_the_adapters_templates_and_a_pathless_card(
    tiny_model: Path, tiny_source: ChatSource, tmp_path: Path
) -> None:
    from qlora_tui.export.merge import merge

    adapter, templates = tmp_path / "adapter", "additional_chat_templates"
    shutil.copytree(tiny_source.adapters["adapter"], adapter)
    for folder, names in ((tiny_model, ("tool_use", "rag")), (adapter, ("tool_use",))):
        (folder / templates).mkdir()
        for name in names:
            (folder / templates / f"{name}.jinja").write_text(f"of {folder.name}")
    (adapter / "chat_template.jinja").write_text("the adapter's")
    source = msgspec.structs.replace(tiny_source, adapters={"adapter": str(adapter)})
    out = Path(merge(source, "adapter", tmp_path / "out", base_name="original").folder)
    shutil.rmtree(tiny_model / templates)
    assert (out / "chat_template.jinja").read_text() == "the adapter's"
    assert [path.name for path in (out / templates).iterdir()] == ["tool_use.jinja"]
    assert (out / templates / "tool_use.jinja").read_text() == "of adapter"
    assert (out / "tokenizer.json").is_file()
    card = (out / "README.md").read_text()
    assert "| Base model | model |" in card
    assert str(tmp_path.parent) not in card


@pytest.mark.parametrize(
    ("other", "named"), [({"num_hidden_layers": 3}, r"layers\.2"), ({"hidden_size": 32}, "in the base and")]
)
def test_an_adapter_of_another_model_leaves_nothing_behind(
    tiny_source: ChatSource, tmp_path: Path, other: dict[str, int], named: str
) -> None:
    from qlora_tui.export.merge import merge
    from tests.training.tiny_model import make_tiny_model

    model = make_tiny_model(tmp_path / "other", **other)
    adapter = str(make_adapter(model, tmp_path / "adapter"))
    source = msgspec.structs.replace(tiny_source, adapters={"adapter": adapter})
    with pytest.raises(UserError, match=named):
        merge(source, "adapter", tmp_path / "out", base_name="original")
    assert not list(tmp_path.glob("*out*"))


def test_transposed_matrices_are_merged_whatever_the_adapter_says(tmp_path: Path) -> None:
    """A run in 4 bits adapts GPT-2's matrices the other way round from how they are stored."""
    from qlora_tui.export.merge import merge

    adapter = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    source = make_source(tmp_path, model_type="gpt2", adapter=adapter)
    merged = []
    for fan_in_fan_out in ("true", "false"):
        file = Path(source.adapters["adapter"]) / "adapter_config.json"
        config = json.loads(file.read_text()) | {"fan_in_fan_out": fan_in_fan_out == "true"}
        file.write_text(json.dumps(config))
        folder = merge(source, "adapter", tmp_path / fan_in_fan_out, base_name="original").folder
        merged.append((Path(folder) / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]


def test_no_space_is_noticed_before_anything_is_written(
    tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tui.export.merge import merge

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="disk space"):
        merge(tiny_source, "adapter", tmp_path / "out", base_name="original")
    assert not list(tmp_path.iterdir())


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
    assert "1 MiB is free" in str(verify_merge(tiny_source, "adapter", Path(tiny_source.recipe.model.id)))


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


def test_a_weight_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from qlora_tui.adapters.weight_files import read_tensor

    file = tmp_path / "model.safetensors"
    for value in (1.0, 2.0):
        save_file({"weight": torch.full((2,), value)}, tmp_path / "draft")
        (tmp_path / "draft").replace(file)
        assert read_tensor(file, "weight").tolist() == [value, value]
