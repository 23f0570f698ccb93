"""LoRA is on exactly the modules that the recipe names, and may start from an earlier adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from qlora_tui.catalog.adapters import WEIGHTS, adapter_differences
from qlora_tui.catalog.local_models import load_architecture
from qlora_tui.chat.adapters import AdapterSet
from qlora_tui.checksums import digest, write_checksums
from qlora_tui.errors import UserError
from qlora_tui.memory import trainer_execution
from qlora_tui.memory.budget import budget_for
from qlora_tui.memory.execution import Device
from qlora_tui.memory.layout import build_layout
from qlora_tui.recipe.schema import Lora, Recipe
from qlora_tui.recipe.targets import match_modules
from qlora_tui.recipe.toml import dump
from qlora_tui.runs import actions
from qlora_tui.runs.actions import with_initial_adapter
from qlora_tui.runs.damage import adapter_damage
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.doctor import CheckKind, Machine
from qlora_tui.runs.events import Evaluated, Failed, ValidationCompared
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.status import Status, write_status
from qlora_tui.training.adapter import (
    StartingAdapter,
    add_lora,
    load_initial_adapter,
    misread_by_peft,
    save_adapter,
)
from qlora_tui.training.description import architecture_of
from tests.catalog.configs import config as config_of
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_resume import interrupted_at

pytestmark = pytest.mark.slow

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _deepseek(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype", "dtype")}
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(**values)).eval()


@pytest.mark.parametrize(
    "targets",
    [("all-linear",), ("up_proj", "q_proj"), ("model.layers.1.mlp.shared_experts.down_proj",)],
)
def test_shared_experts_are_adapted_and_routed_ones_are_not(targets: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    from qlora_tui.training.adapter import add_lora, load_adapter, save_adapter, trained_parameters

    config = config_of("deepseek-ai/DeepSeek-V2-Lite") | TINY
    architecture, lora = architecture_of(config), Lora(rank=4, target_modules=targets)
    model = add_lora(_deepseek(config), lora, architecture)
    touched = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert touched == {module.name for module in match_modules(targets, architecture.modules)}
    layout = build_layout(Recipe(lora=lora), architecture, trainer_execution(Recipe(), Device()))
    assert trained_parameters(model) == layout.adapter_parameters

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
    ids = torch.arange(12)[None]
    base = _deepseek(config)
    adapters = AdapterSet(base, {"adapter": str(tmp_path)})
    before = base(ids).logits
    adapters.ensure_loaded("adapter")
    adapters.activate("adapter")
    with torch.no_grad():
        # The chat adds in another order, and with such factors the layers after it make more of that.
        torch.testing.assert_close(base(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(base(ids).logits, before)


LORA = Lora(rank=8, alpha=16, rank_pattern={"1.q_proj": 4}, alpha_pattern={"1.q_proj": 6.0})


def new_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter, with its recipe, in which no matrix is zero."""
    import torch

    folder = tmp_path_factory.mktemp("adapter")
    model = add_lora(new_model(tiny_model), LORA, load_architecture(str(tiny_model)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    save_adapter(model, folder)
    (folder / "recipe.toml").write_text(dump(Recipe(lora=LORA)))
    return folder


def test_the_weights_are_those_that_peft_loads(tiny_model: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    architecture = load_architecture(str(tiny_model))
    model = add_lora(new_model(tiny_model), LORA, architecture)
    load_initial_adapter(model, structs.replace(LORA, init_from=str(adapter)), architecture)
    ours = get_peft_model_state_dict(model)
    by_peft = PeftModel.from_pretrained(new_model(tiny_model), str(adapter), is_trainable=True)
    theirs = get_peft_model_state_dict(by_peft)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    # The scale of each module, by patterns too.
    factors = {name: m.scaling for name, m in model.named_modules() if hasattr(m, "scaling")}
    assert factors == {name: m.scaling for name, m in by_peft.named_modules() if hasattr(m, "scaling")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 16}, "rank 16 and alpha 16 in the recipe, 8 and 16 in the adapter"),
        ({"alpha": 8.0}, "alpha 8 in the recipe, 8 and 16"),
        ({"rank_pattern": {}}, "layers.1.self_attn.q_proj has rank 8 and alpha 6 in the recipe, 4 and 6"),
        ({"alpha_pattern": {}}, "layers.1.self_attn.q_proj has rank 4 and alpha 16 in the recipe, 4 and 6"),
        ({"target_modules": ("q_proj",)}, "the adapter has 12 modules that the recipe does not adapt"),
        ({"use_rslora": True}, "rsLoRA is on in the recipe and off in the adapter"),
        ({"use_dora": True}, "DoRA is on in the recipe and off in the adapter"),
        ({"train_embeddings": True}, "Train embeddings is on in the recipe and off in the adapter"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    recipe: MakeRecipe, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    lora = structs.replace(LORA, init_from=str(adapter), **changes)
    wanted = structs.replace(recipe(), lora=lora)
    architecture = load_architecture(wanted.model.id)
    assert any(words in each for each in adapter_differences(adapter, lora, architecture))
    checks = preflight(wanted, Machine(budget_for(None)))
    [check] = [each for each in checks if each.kind is CheckKind.LORA]
    assert check.outcome == "error" and words in check.text
    # The fix that one key applies.
    assert check.suggested_fix is not None
    repaired = {
        **structs.asdict(lora),
        **{k.partition(".")[2]: v for k, v in check.suggested_fix.changes.items()},
    }
    assert adapter_differences(adapter, Lora(**repaired), architecture) == []


def other_tokens(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [3]}))


def one_more_tensor(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {"experts.lora_A.weight": next(iter(weights.values())).clone()})


def longer_outputs(folder: Path) -> None:
    rewrite(folder, lambda weights: {k: v.repeat(2, 1) if "lora_B" in k else v for k, v in weights.items()})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def shortened(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def changed_after_checksums(folder: Path) -> None:
    write_checksums(folder)
    rewrite(folder, lambda weights: {name: tensor + 1 for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_tokens, r"does not match the recipe: .* the rows of other tokens"),
        (one_more_tensor, r"does not match the recipe: .* only it has experts\.lora_A\.weight"),
        (longer_outputs, r"does not match the recipe: .* has the shape \(128, 8\), not \(64, 8\)"),
        (shortened, "The adapter is damaged"),
        (changed_after_checksums, "The adapter is damaged"),
    ],
)
def test_weights_that_do_not_fit_are_not_loaded(
    tiny_model: Path, adapter: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    change(folder)
    architecture = load_architecture(str(tiny_model))
    model = add_lora(new_model(tiny_model), LORA, architecture)
    with pytest.raises(UserError, match=words):
        load_initial_adapter(model, structs.replace(LORA, init_from=str(folder)), architecture)


@pytest.mark.parametrize("damage", ["missing", "short", "other names", "other shapes"])
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    from torch import nn

    file = tmp_path / "starting_adapter.safetensors"
    StartingAdapter.of(nn.Linear(2, 3)).write(file)
    StartingAdapter.read(file, nn.Linear(2, 3))
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-4])
    model = {"other names": nn.Sequential(nn.Linear(2, 3)), "other shapes": nn.Linear(4, 3)}.get(damage)
    with pytest.raises(UserError, match="The starting adapter cannot be read"):
        StartingAdapter.read(file, model or nn.Linear(2, 3))


@pytest.mark.parametrize("named", ["no-such-run", "/no/such/folder", "{tmp}"])
def test_a_missing_adapter_is_an_error(recipe: MakeRecipe, tmp_path: Path, named: str) -> None:
    wanted = recipe({"lora.init_from": named.format(tmp=tmp_path)})
    with pytest.raises(UserError, match=r"No such run|No adapter to start from"):
        with_initial_adapter(wanted)
    checks = preflight(wanted, Machine(budget_for(None)))
    assert [each.outcome for each in checks if each.kind is CheckKind.LORA] == ["error"]


@pytest.mark.parametrize(("line", "refused"), [('init_weights = "loftq"', True), ("rank = 8", False)])
def test_an_adapter_that_began_with_loftq_is_refused(
    recipe: MakeRecipe, adapter: Path, tmp_path: Path, *, line: str, refused: bool
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "recipe.toml").write_text(f'[lora]\n{line}\n[training]\noptimizer = "of another version"\n')
    wanted = structs.replace(recipe(), lora=structs.replace(LORA, init_from=str(folder)))
    checks = preflight(wanted, Machine(budget_for(None)))
    [check] = [each for each in checks if each.kind is CheckKind.LORA]
    assert (check.outcome == "error") is refused
    with pytest.raises(UserError, match="LoftQ") if refused else nullcontext():
        with_initial_adapter(wanted)


def test_a_start_deleted_while_the_run_waited_is_said(
    recipe: MakeRecipe, trainers: Trainers, adapter: Path
) -> None:
    first = create_run(recipe())
    write_status(first, Status(state="finished", at=1.0))
    shutil.copytree(adapter, first.adapter_dir)
    waits = create_run(recipe({"lora.init_from": str(first.adapter_dir)}))
    actions.move_to_trash(first)
    assert trainers.run(waits) != 0
    (ending,) = events_of(waits, Failed)
    assert ending.title == "No adapter to start from"
    assert first.id in ending.what and f"runs restore {first.id}" in ending.fix
    actions.empty_trash()
    assert trainers.run(waits) != 0
    assert "does not exist" in events_of(waits, Failed)[-1].what


def test_a_run_trains_an_earlier_adapter_further(recipe: MakeRecipe, trainers: Trainers) -> None:
    settings = {"training.max_steps": 3, "training.checkpoint_every": 1, "training.keep_checkpoints": 9}
    first = create_run(recipe(settings))
    assert trainers.run(first) == 0
    before = digest(first.adapter_dir)
    run = actions.prepare(recipe({**settings, "lora.init_from": first.id}))
    assert run.recipe().lora.init_from == str(first.adapter_dir)
    assert trainers.run(run) == 0
    assert adapter_damage(first.adapter_dir) is None and digest(first.adapter_dir) == before
    ended, starts = events_of(first, Evaluated)[-1].loss, events_of(run, Evaluated)[0].loss
    # The verdict is on what this run added.
    assert events_of(run, ValidationCompared)[0].before == pytest.approx(starts, abs=1e-3)
    assert starts == pytest.approx(ended, abs=1e-6) != events_of(first, Evaluated)[0].loss
    # A resume needs the earlier adapter no more.
    again = interrupted_at(run, 1)
    shutil.rmtree(first.path)
    assert trainers.run(again) == 0
    assert losses(again) == losses(run)


def test_targets_that_plain_peft_reads_as_experts_are_named() -> None:
    shared, attention = "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.self_attn.q_proj"
    gate = "model.layers.1.mlp.shared_experts.gate_proj"
    assert misread_by_peft("deepseek_v3", [attention, gate, shared]) == [shared, gate]
    assert misread_by_peft("llama", [attention, gate, shared]) == []
