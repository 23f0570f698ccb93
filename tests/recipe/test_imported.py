"""Files of other trainers are read as recipes, or refused by name; what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.recipe.imported import ImportedRecipe, import_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.toml import to_recipe

AXOLOTL = """
base_model: Qwen/Qwen3-4B
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
    split: train[:10%]
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: constant_with_warmup
learning_rate: 2e-5
warmup_steps: 10
max_steps: 100
bf16: auto
evals_per_epoch: 4
wandb_project:
invented_key: 3
"""
FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
stage: dpo
pref_loss: simpo
finetuning_type: lora
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: mine, other
learning_rate: 1.0e-4
hf_hub_token: hf_planted
"""
FACTORY_V1 = """
model: Qwen/Qwen3-4B
model_class: llm
peft_config: {name: lora, r: 16, target_modules: all}
quant_config: {name: bnb, quantization_bit: 4}
cutoff_len: 2048
"""
UNSLOTH = """
max_seq_length = 512
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen3-4B", max_seq_length=max_seq_length,
    load_in_4bit=True, token="hf_planted")
model = FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj"], lora_alpha=16,
    use_gradient_checkpointing="unsloth")
dataset = load_dataset("json", data_files={"train": "rows.jsonl"}, split="train")
trainer = SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig(num_train_epochs=2,
    bf16=is_bfloat16_supported(), learning_rate=rate(), optim="adamw_8bit"))
open("ran", "w")
"""
PEFT = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen3-4B",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    info = {"mine": {"file_name": "rows.jsonl", "ranking": True, "columns": {"prompt": "instruction"}}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def read(folder: Path, name: str, text: str) -> tuple[ImportedRecipe, Recipe]:
    (folder / name).write_text(text)
    imported = import_recipe(folder / name)
    return imported, to_recipe(imported.layer)


def left_out(imported: ImportedRecipe) -> dict[str, Any]:
    return {left.key: left.value for left in imported.left_out}


def test_axolotl(folder: Path) -> None:
    imported, recipe = read(folder, "qlora.yml", AXOLOTL)
    assert (recipe.model.id, recipe.quantization.method, recipe.data.max_length) == (
        "Qwen/Qwen3-4B",
        "nf4",
        4096,
    )
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.target_modules) == (32, 64, ("all-linear",))
    training = recipe.training
    assert (training.learning_rate, training.lr_scheduler, training.optimizer) == (
        2e-5,
        "constant",
        "adamw_8bit",
    )
    assert (training.warmup_ratio, training.epochs, training.gradient_accumulation) == (0.1, 1, 4)
    (source,) = recipe.data.sources
    assert (source.path, source.format) == ("rows.jsonl", "alpaca")
    # axolotl's own defaults, where the file says nothing
    assert (recipe.data.overflow, recipe.data.validation_fraction) == ("drop", 0)
    assert left_out(imported) == {"datasets.split": "train[:10%]", "evals_per_epoch": 4, "invented_key": 3}
    assert [left.key for left in imported.left_out if not left.why] == ["invented_key"]


def test_llama_factory_with_its_registry(folder: Path) -> None:
    imported, recipe = read(folder, "dpo.yaml", FACTORY)
    assert recipe.data.preferences == "simpo"
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16)
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    (source,) = recipe.data.sources
    assert (Path(source.path), source.columns) == (folder / "data/rows.jsonl", {"prompt": "instruction"})
    assert left_out(imported) == {"dataset": "other", "hf_hub_token": "(not shown)"}


def test_tables_of_llama_factory_v1(folder: Path) -> None:
    imported, recipe = read(folder, "v1.yaml", FACTORY_V1)
    assert (recipe.lora.rank, recipe.quantization.method) == (16, "nf4")
    assert recipe.lora.target_modules == ("all-linear",)
    assert left_out(imported) == {}


@pytest.mark.parametrize(
    ("changes", "method", "left"),
    [
        ("load_in_4bit: false\n", "none", {}),
        ("load_in_4bit: false\nload_in_8bit: true\n", "int8", {}),
        ("bnb_4bit_quant_type: fp4\n", "fp4", {}),
        ("load_in_4bit: false\nbnb_4bit_quant_type: fp4\n", "none", {}),
        ("load_in_4bit: [1]\nquantization_bit: 3\n", "none", {"load_in_4bit": [1], "quantization_bit": 3}),
    ],
)
def test_the_storage_of_the_base(folder: Path, changes: str, method: str, left: dict[str, Any]) -> None:
    plain, _ = read(folder, "plain.yml", AXOLOTL)
    imported, recipe = read(folder, "a.yml", AXOLOTL + changes)
    assert recipe.quantization.method == method
    assert left_out(imported) == left_out(plain) | left


def test_modules_that_only_a_run_knows_are_left_out(folder: Path) -> None:
    imported, recipe = read(folder, "a.py", UNSLOTH.replace('["q_proj"]', "modules"))
    assert left_out(imported)["target_modules"] == "modules"
    assert recipe.lora.target_modules == Recipe().lora.target_modules


def test_a_script_is_read_and_not_run(folder: Path) -> None:
    imported, recipe = read(folder, "train.py", UNSLOTH)
    assert (recipe.model.id, recipe.data.max_length, recipe.lora.rank) == ("unsloth/Qwen3-4B", 512, 8)
    assert recipe.training.gradient_checkpointing == "offload"
    assert [source.path for source in recipe.data.sources] == ["rows.jsonl"]
    # TRL learns whole conversations unless it is told otherwise.
    assert recipe.data.train_on == "everything"
    assert left_out(imported) == {"token": "(not shown)", "learning_rate": "rate()"}
    assert not (folder / "ran").exists()


def test_an_adapter(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(PEFT))
    (folder / "adapter" / "trainer_state.json").write_text('{"num_train_epochs": 5}')
    recipe = to_recipe(import_recipe(folder / "adapter").layer)
    assert (recipe.lora.rank, recipe.lora.target_modules) == (4, ("v_proj", "q_proj"))
    assert recipe.training.epochs == 5


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.yml", AXOLOTL.replace("adapter: qlora\n", ""), "adapter"),
        ("a.yml", AXOLOTL + "rl: grpo\n", "rl"),
        ("a.yml", AXOLOTL + "reward_model: true\n", "reward_model"),
        ("a.yaml", FACTORY.replace("finetuning_type: lora", "finetuning_type: full"), "finetuning_type"),
        ("a.yaml", FACTORY.replace("stage: dpo", "stage: rm"), "stage"),
        ("a.yaml", FACTORY.replace("pref_loss: simpo", "pref_loss: [simpo]"), "pref_loss"),
        ("a.py", UNSLOTH.replace("get_peft_model", "other"), "adapter"),
        ("adapter_config.json", json.dumps(PEFT | {"peft_type": "IA3"}), "peft_type"),
        ("a.yml", "a: &x [1]\nb: *x\n", "aliases"),
        ("a.yml", "a: [1\n", "line 2"),
        ("a.yml", "[" * 5000, "nested too deeply"),
        ("a.py", "def f(:\n", "Python"),
        ("a.yml", "name: someone\n", "no settings"),
    ],
)
def test_what_is_no_lora_training_is_refused_by_name(folder: Path, name: str, text: str, names: str) -> None:
    with pytest.raises(UserError) as refused:
        read(folder, name, text)
    assert names in refused.value.what


def test_the_command_writes_a_recipe_and_overwrites_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "qlora.yml").write_text(AXOLOTL)
    assert main(["import", "qlora.yml", "-o", "recipe.toml"]) == 0
    assert "invented_key" in capsys.readouterr().err
    assert main(["import", "qlora.yml", "-o", "recipe.toml"]) == 2
    capsys.readouterr()
    assert main(["import", "qlora.yml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["lora"]["rank"] == 32


def test_the_command_names_what_only_the_script_knows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.py").write_text(UNSLOTH)
    assert main(["import", "train.py"]) == 0
    assert 'learning_rate = "rate()"' in capsys.readouterr().err
    assert main(["import", "train.py", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["left_out"]
    assert {each["key"]: each["value"] for each in left}["learning_rate"] == "rate()"


def test_counts_that_are_no_numbers_are_left_out(folder: Path) -> None:
    changes = {"val_set_size": "much", "warmup_steps": "few", "batch_size": "many"}
    text = AXOLOTL + "".join(f"{key}: {value}\n" for key, value in changes.items())
    imported, recipe = read(folder, "a.yml", text)
    assert changes.items() <= left_out(imported).items()
    assert (recipe.data.validation_fraction, recipe.training.warmup_ratio) == (0, 0.03)


def test_a_registry_with_values_of_other_kinds_is_read(folder: Path) -> None:
    info = {"mine": {"file_name": "rows.jsonl", "formatting": ["alpaca"], "columns": ["prompt"]}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    _, recipe = read(folder, "a.yaml", FACTORY)
    (source,) = recipe.data.sources
    assert (Path(source.path), source.format, source.columns) == (folder / "data/rows.jsonl", "auto", {})
