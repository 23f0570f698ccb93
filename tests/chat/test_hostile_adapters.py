"""Adapters by third parties: loaded or rejected with an error, whatever their files contain."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.adapters import load_adapter_config
from qlora_tui.checksums import write_checksums
from qlora_tui.errors import UserError
from tests.fuzz.damage import WRONG_VALUES

pytestmark = pytest.mark.slow
KEYS = (
    "r", "lora_alpha", "lora_dropout", "bias", "target_modules", "exclude_modules", "target_parameters",
    "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "layer_replication", "trainable_token_indices", "lora_bias",
    "alora_invocation_tokens", "use_bdlora", "peft_type", "task_type", "megatron_config", "eva_config",
    "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "peft_version", "inference_mode",
)  # fmt: skip
HOSTILE: dict[str, dict[str, Any]] = {
    "rank": {"r": 20_000_000},
    "rank of a module": {"rank_pattern": {"q_proj": 20_000_000}},
    "rank that is not of the weights": {"r": 1000},
    "pattern of modules": {"target_modules": "((a|[a-z._0-9])*)*Z"},
    "pattern of other modules": {"exclude_modules": "((a|[a-z._0-9])*)*Z"},
    "pattern of layers": {"layers_to_transform": [0], "layers_pattern": "((a|[a-z._0-9])*)*Z"},
    "pattern of ranks": {"rank_pattern": {"((a|[a-z._0-9])*)*Z": 4}},
    "pattern of scales": {"alpha_pattern": {"((a|[a-z._0-9])*)*Z": 4}},
    "many patterns": {"rank_pattern": {f"m{number}": 4 for number in range(100_000)}},
    "replicated layers": {"layer_replication": [[0, 2]] * 100_000},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    from tests.chat.adapters import make_adapter

    return make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])


def load(base: Path, adapter: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_tui.chat.adapters import AdapterSet

    config = adapter / "adapter_config.json"
    original = config.read_bytes()
    config.write_text(json.dumps({**json.loads(original), **changes}))
    try:
        AdapterSet(AutoModelForCausalLM.from_pretrained(base), {"adapter": str(adapter)}).ensure_loaded(
            "adapter"
        )
    finally:
        config.write_bytes(original)


def test_any_config_value_is_read_or_rejected(base: Path, adapter: Path) -> None:
    for number, key in enumerate(KEYS):
        for value in WRONG_VALUES[number % 3 :: 3]:
            try:
                load(base, adapter, {key: value})
            except UserError as refused:
                assert refused.what
            except Exception as error:
                error.add_note(f"{key} = {str(value)[:40]}")
                raise


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_that_takes_time_or_memory_is_harmless(name: str, base: Path, adapter: Path) -> None:
    if name in ("pattern of modules", "pattern of other modules", "pattern of layers"):
        load(base, adapter, HOSTILE[name])  # the weights themselves say which modules it changes
    else:
        with pytest.raises(UserError):
            load(base, adapter, HOSTILE[name])


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "olora", "pissa", "loftq"])
def test_the_base_stays_as_it_is_whatever_the_initialization(init: Any, base: Path, adapter: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_tui.chat.adapters import AdapterSet

    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": init}))
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with suppress(UserError):
        AdapterSet(model, {"adapter": str(adapter)}).ensure_loaded("adapter")
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_chat_rejects_a_pipe_in_place_of_a_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    with pytest.raises(UserError, match="it is not a regular file"):
        load_adapter_config(adapter)


@pytest.mark.parametrize("missing", ["lora_A", "lora_B"])
def test_an_adapter_without_one_of_its_matrices_is_refused(missing: str, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qlora_tui.adapters.deltas import read_deltas

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if missing in key)]
    save_file(tensors, file)
    with pytest.raises(UserError, match="do not belong together"):
        read_deltas(adapter)


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
    assert "adapter_model.safetensors has changed since it was written" in caught.value.what
