"""Recipes written for other trainers: read back they are the same, and what has no counterpart is named."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_tui.cli import main
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.written_rows import TRAIN, VALIDATION, write_rows
from qlora_tui.errors import UserError
from qlora_tui.recipe.exported import Target, export_recipe
from qlora_tui.recipe.fields import get_setting
from qlora_tui.recipe.imported import import_recipe
from qlora_tui.recipe.layering import merge_layers
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.recipe.toml import to_recipe
from tests.data.families import tokenizer_for

FULL: dict[str, Any] = {
    "model": {"id": 'a"b/Model', "revision": "v2"},
    "quantization": {"method": "nf4", "double_quantization": False, "compute_dtype": "float16"},
    "lora": {"rank": 8, "alpha": 4.0, "dropout": 0.1, "use_rslora": True, "use_dora": True},
    "data": {"max_length": 4096, "packing": False},
    "training": {
        "micro_batch_size": 3,
        "gradient_accumulation": 5,
        "epochs": 1.5,
        "max_steps": 70,
        "learning_rate": 3e-5,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.25,
        "optimizer": "paged_adamw_8bit",
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
        "gradient_checkpointing": "on",
        "eval_every": 10,
        "checkpoint_every": 20,
        "keep_checkpoints": 4,
        "neftune_alpha": 5.0,
        "seed": 7,
    },
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"quantization": {"method": "fp4"}},
    {"quantization": {"method": "int8", "double_quantization": True}},
    {"quantization": {"method": "none", "double_quantization": True, "compute_dtype": "bfloat16"}},
    {"lora": {"target_modules": ["q_proj", "up_proj"], "train_embeddings": True}},
    {"training": {"eval_every": 0, "checkpoint_every": 0, "max_steps": 0, "neftune_alpha": 0.0}},
    {"training": {"lr_scheduler": "linear"}},
]


def written(layer: dict[str, Any], target: Target, folder: Path, files: tuple[str, ...] = (TRAIN,)) -> Any:
    exported = export_recipe(to_recipe(layer), target, files)
    (folder / exported.name).write_text(exported.text)
    return exported


@pytest.mark.parametrize("target", ["axolotl", "script"])
@pytest.mark.parametrize("changes", CHANGES)
def test_what_is_read_back_is_the_same(tmp_path: Path, target: Target, changes: dict[str, Any]) -> None:
    layer = merge_layers(FULL, changes)
    exported = written(layer, target, tmp_path, (TRAIN, VALIDATION))
    assert exported.left_out == ()
    back = to_recipe(import_recipe(tmp_path / exported.name).layer)
    for section, settings in layer.items():
        for key in settings:
            path = f"{section}.{key}"
            assert get_setting(back, path) == get_setting(to_recipe(layer), path), path


@pytest.mark.parametrize(
    ("target", "method"), [("axolotl", "dpo"), ("axolotl", "simpo"), ("script", "simpo")]
)
def test_preferences_are_read_back(tmp_path: Path, target: Target, method: str) -> None:
    layer = merge_layers(
        FULL, {"data": {"preferences": method}, "training": {"preference_beta": 0.3, "simpo_gamma": 0.7}}
    )
    exported = written(layer, target, tmp_path)
    has_steps_only = (target, method) == ("axolotl", "simpo")
    assert [one.key for one in exported.left_out] == ["training.warmup_ratio"] * has_steps_only
    back = to_recipe(import_recipe(tmp_path / exported.name).layer)
    assert (back.data.preferences, back.training.preference_beta) == (method, 0.3)
    assert method != "simpo" or back.training.simpo_gamma == 0.7


_CHECK_AXOLOTL = """
import json, sys
from axolotl.utils.schemas.config import AxolotlInputConfig

for keys in json.load(sys.stdin):
    unknown = keys.keys() - AxolotlInputConfig.model_fields.keys()
    assert not unknown, unknown
    read = AxolotlInputConfig(**keys)
    changed = {name for name in keys if keys[name] != getattr(read, name)}
    assert changed <= {"datasets", "test_datasets"}, changed
"""


@pytest.mark.slow
@pytest.mark.skipif("AXOLOTL" not in os.environ, reason="AXOLOTL is the folder that has axolotl")
def test_axolotl_reads_every_key(tmp_path: Path) -> None:
    preferences = [{"data": {"preferences": method}} for method in ("dpo", "simpo")]
    configs = []
    for changes in (*CHANGES, *preferences):
        exported = written(merge_layers(FULL, changes), "axolotl", tmp_path, (TRAIN, VALIDATION))
        configs.append(yaml.safe_load(exported.text))
    python = [sys.executable, "-c", _CHECK_AXOLOTL]
    environ = os.environ | {"PYTHONPATH": os.environ["AXOLOTL"]}
    subprocess.run(python, input=json.dumps(configs), text=True, check=True, env=environ)


def test_turns_need_the_template_that_tokens_do_not(tmp_path: Path) -> None:
    layer = merge_layers(FULL, {"model": {"chat_template": "chatml"}})
    assert written(layer, "script", tmp_path).left_out == ()
    exported = written(merge_layers(layer, {"data": {"preferences": "dpo"}}), "script", tmp_path)
    assert [one.key for one in exported.left_out] == ["model.chat_template"]


@pytest.mark.parametrize("target", ["axolotl", "script"])
def test_more_than_all_linear_is_named(tmp_path: Path, target: Target) -> None:
    exported = written(
        merge_layers(FULL, {"lora": {"target_modules": ["all-linear", "lm_head"]}}), target, tmp_path
    )
    assert [one.key for one in exported.left_out] == ["lora.target_modules"]
    back = to_recipe(import_recipe(tmp_path / exported.name).layer)
    assert back.lora.target_modules == ("all-linear",)


@pytest.mark.parametrize("target", ["axolotl", "script"])
def test_what_has_no_counterpart_is_named(tmp_path: Path, target: Target) -> None:
    changes = {
        "quantization": {"skip": ["o_proj"]},
        "lora": {"target_modules": ["8-23.q_proj"], "rank_pattern": {"q_proj": 4}},
        "training": {"lr_scheduler": "wsd", "replay_share": 0.1},
    }
    exported = written(merge_layers(FULL, changes), target, tmp_path)
    assert {one.key for one in exported.left_out} == {
        "quantization.skip",
        "lora.target_modules",
        "lora.rank_pattern",
        "training.lr_scheduler",
        "training.replay_share",
    }


@pytest.mark.parametrize(
    ("changes", "target", "names"),
    [
        ({"model": {"id": "a.gguf"}}, "script", "GGUF"),
        ({"data": {"preferences": "kto"}}, "axolotl", "kto"),
        ({"data": {"preferences": "orpo"}}, "axolotl", "orpo"),
    ],
)
def test_what_others_cannot_train_is_refused(changes: dict[str, Any], target: Target, names: str) -> None:
    with pytest.raises(UserError, match=names):
        export_recipe(to_recipe(merge_layers(FULL, changes)), target, (TRAIN,))


def test_every_script_is_python() -> None:
    for method in ("refuse", "dpo", "orpo", "simpo", "kto"):
        for changes in CHANGES:
            layer = merge_layers(merge_layers(FULL, changes), {"data": {"preferences": method}})
            ast.parse(export_recipe(to_recipe(layer), "script", (TRAIN,)).text)


def test_the_command_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert main(["export", "recipe", "recipe.toml", str(tmp_path / "taken")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rows_have_the_tokens_and_labels_of_a_run(tmp_path: Path) -> None:
    rows = [{"instruction": f"question {n}?", "output": f"answer {n}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_for()
    source = Source(path=str(tmp_path / "rows.jsonl"), excluded_rows="3")
    recipe = Recipe(data=Data(sources=(source,), validation_fraction=0.2))
    prepared = prepare_dataset(recipe, tokenizer)
    counts = write_rows(recipe, prepared, tokenizer.traits, tmp_path)
    train, validation = lines(tmp_path / TRAIN), lines(tmp_path / VALIDATION)
    assert (len(train), len(validation)) == (counts.train, counts.validation)
    assert len(train) + len(validation) == 19 and validation
    for line, i in zip(train, range(len(prepared.train)), strict=True):
        assert line["input_ids"] == list(prepared.train.token_ids(i))
        learned = [token for token in line["labels"] if token != -100]
        assert tokenizer.decode(learned).startswith("answer")
        assert len(learned) < len(line["labels"]) == len(line["attention_mask"])


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_are_written_as_turns(tmp_path: Path, method: Any) -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_for()
    source = Source(path=str(tmp_path / "rows.jsonl"))
    recipe = Recipe(data=Data(sources=(source,), validation_fraction=0.2, preferences=method))
    counts = write_rows(recipe, prepare_dataset(recipe, tokenizer), tokenizer.traits, tmp_path)
    both = lines(tmp_path / TRAIN) + lines(tmp_path / VALIDATION)
    assert counts.validation and len(both) == counts.train + counts.validation
    answers = {line["prompt"][-1]["content"]: line for line in both}
    assert len(answers) == 10
    if method == "dpo":
        assert all(answers[f"q{n}"]["chosen"][0]["content"] == f"good {n}" for n in range(10))
        assert all(answers[f"q{n}"]["rejected"][0]["content"] == f"bad {n}" for n in range(10))
    else:
        assert sorted(line["completion"][0]["content"] for line in both if line["label"]) == sorted(
            f"good {n}" for n in range(10)
        )
