"""Adapter folders: within the limits of vLLM, with the command that serves them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.errors import UserError
from qlora_tui.export.adapter_folder import export_adapter_folder
from tests.export.export_sources import make_source

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("name", ["a,b", "a=b"])
def test_a_name_that_vllm_would_split_is_written_as_json(tmp_path: Path, name: str) -> None:
    written = export_adapter_folder(make_source(tmp_path, adapter={"r": 4}), "adapter", tmp_path / name)
    assert json.loads(shlex.split(written.command)[-1]) == {"name": name, "path": f"{tmp_path}/{name}"}


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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_vllm_folder_says_on_which_base_it_is_served(tmp_path: Path, quantization: str) -> None:
    source = make_source(tmp_path, quantization=quantization)
    summary = export_adapter_folder(source, "adapter", tmp_path / "folder").summary
    assert ("trained on NF4 weights, so its answers may differ" in summary) == (quantization == "nf4")
    shutil.rmtree(source.recipe.model.id)
    again = export_adapter_folder(source, "adapter", tmp_path / "again")
    assert f"The base {source.recipe.model.id} is missing" in again.summary
