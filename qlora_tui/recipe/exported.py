"""Exports recipes to other trainers: a config for axolotl, or a script that uses transformers, peft and trl.

``writes`` in ``trainers.toml`` lists the keys to write. Their values come from the rules for imports, applied
in reverse. The code in this module writes settings that need more than one key. Settings without a
counterpart are reported.
:mod:`qlora_tui.data.written_rows` writes the rows to files next to the config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal

from msgspec import Struct

from qlora_tui.errors import UsageError
from qlora_tui.recipe.fields import fields, get_setting
from qlora_tui.recipe.schema import ALL_LINEAR, Recipe
from qlora_tui.recipe.trainers import TABLES, LeftOut, Rule, nested, rule_of

Target = Literal["axolotl", "script"]
"""The formats to which a recipe can be exported."""
_SCRIPT = Path(__file__).with_name("exported_script.txt")
_TRAINERS = {
    None: ("trl", "SFT"),
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "simpo": ("trl.experimental.cpo", "CPO"),
}
"""For each preference method, the module of TRL's trainer and the prefix of its class names.

``None`` stands for supervised fine-tuning.
"""
_NOT_LEARNED = {
    "name",
    "note",
    "data.sources",
    "data.validation_path",
    "data.validation_fraction",
    "data.validation_seed",
    "data.overflow",
    "data.train_on",
    "data.reasoning_in_loss",
    "data.bad_rows",
    "data.thinking",
    "quantization.method",
    "data.preferences",
    "model.attention",
    "model.kernels",
    "quantization.streamed_layers",
    "training.auto_micro_batch",
    "training.first_step_differs",
    "training.sample_prompts",
    "training.general_prompts",
    "training.task_prompts",
    "training.report_to",
}
"""Settings that are never reported as left out.

The written rows or the code below reflect them, or they do not change what is learned.
"""
_AXOLOTL_PAIRS = {"type": "chat_template.default", "field_messages": "prompt"}


_IN_SCRIPT = {
    "model.id",
    "model.revision",
    "quantization.double_quantization",
    "quantization.compute_dtype",
    "training.warmup_ratio",
}
"""Settings that a script specifies outside the arguments that ``trainers.toml`` lists, or does not need."""


class ExportedRecipe(Struct, frozen=True):
    """A recipe in the format of another trainer."""

    name: str
    """File name: ``axolotl.yml`` or ``train.py``."""
    text: str
    left_out: tuple[LeftOut, ...]
    """Settings without a counterpart."""


def export_recipe(recipe: Recipe, target: Target, files: Sequence[str]) -> ExportedRecipe:
    """Export a recipe to another trainer; ``files`` are the paths of the training and validation rows.

    Raises UserError for a recipe that the trainer cannot train.
    """
    if recipe.model.id.endswith(".gguf"):
        raise UsageError(
            "No recipe for other trainers",
            what="The base is a GGUF file, which other trainers do not read.",
            fix="Set model.id to the model that the file was made from.",
        )
    if target == "axolotl" and recipe.preference_method in ("orpo", "kto"):
        raise UsageError(
            "No recipe for axolotl",
            what=f"axolotl reads the rows of {recipe.preference_method} only in its own format.",
            fix="Export a script instead: --as script.",
        )
    export = _Export(recipe, target)
    return export.axolotl(files) if target == "axolotl" else export.script(files)


class _Export:
    """The export of one recipe. Settings are written one by one; those that remain have no counterpart in the
    other trainer.
    """

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self._recipe = recipe
        self._trainer = TABLES.trainers[target]
        self._written = set(_NOT_LEARNED)
        if recipe.preference_method is None:
            self._written.add("model.chat_template")  # the rows are tokens

    def axolotl(self, files: Sequence[str]) -> ExportedRecipe:
        import yaml  # importing takes a tenth of a second

        recipe = self._recipe
        keys = self._keys("file")
        if recipe.quantization.method == "fp4":
            keys["load_in_4bit"] = True
        if recipe.preference_method == "simpo":
            # axolotl then takes a number of steps only, and how many there are is not known here.
            del keys["warmup_ratio"]
            self._written.remove("training.warmup_ratio")
        keys |= self._method_keys("rl_beta", "simpo")
        keys["adapter"] = "lora" if recipe.quantization.method in ("none", "int8") else "qlora"
        targets = self._targets()
        keys |= {"lora_target_linear": True} if targets == ALL_LINEAR else {"lora_target_modules": targets}
        if recipe.lora.train_embeddings:
            keys["lora_modules_to_save"] = ["embed_tokens", "lm_head"]
        keys |= self._scheduler_arguments()
        keys |= self._interval("training.eval_every", {"evals_per_epoch": 1}, "eval_steps")
        keys |= self._interval("training.checkpoint_every", {"saves_per_epoch": 1}, "save_steps")
        keys["chat_template"] = "tokenizer_default"
        kind = {"type": None} if recipe.preference_method is None else _AXOLOTL_PAIRS
        for key, file in zip(("datasets", "test_datasets"), files, strict=False):
            keys[key] = [{"path": file, "ds_type": "json", "split": "train", **kind}]
        keys["output_dir"] = "./adapter"
        text = yaml.safe_dump(nested(keys), sort_keys=False, allow_unicode=True)
        return self._result("axolotl.yml", f"# axolotl train axolotl.yml\n{text}")

    def script(self, files: Sequence[str]) -> ExportedRecipe:
        recipe = self._recipe
        module, prefix = _TRAINERS[recipe.preference_method]
        has_validation = len(files) > 1
        dtype = recipe.quantization.compute_dtype.replace("auto", "bfloat16")
        lora = self._keys("LoraConfig") | {"target_modules": self._targets()}
        if recipe.lora.train_embeddings:
            lora["modules_to_save"] = ["embed_tokens", "lm_head"]
        loading = []
        quantization = self._keys("BitsAndBytesConfig")
        if recipe.quantization.method == "fp4":
            quantization["load_in_4bit"] = True
        if recipe.quantization.method != "none":
            inner = _lines([*_arguments(quantization), "bnb_4bit_compute_dtype=dtype"], 8)
            loading.append(f"quantization_config=BitsAndBytesConfig(\n{inner}    )")
        self._written |= _IN_SCRIPT
        parts = {
            "module": module,
            "prefix": prefix,
            "model": _literal(recipe.model.id),
            "dtype": f"torch.{dtype}",
            "revision": _literal(recipe.model.revision),
            "loading": _lines(loading),
            "lora": _lines(_arguments(lora)),
            "config": _lines(_arguments(self._config(has_validation, dtype))),
            "train": files[0],
            "eval": f"eval_dataset=rows({_literal(files[1])}),\n    " if has_validation else "",
        }
        text = Template(_SCRIPT.read_text(encoding="utf-8")).substitute(parts)
        return self._result("train.py", text)

    def _config(self, has_validation: bool, dtype: str) -> dict[str, Any]:
        """Return the arguments of TRL's config."""
        recipe = self._recipe
        method = recipe.preference_method
        config = {"output_dir": "adapter", **self._keys("Config")}
        config |= self._keys("SFTConfig") if method is None else self._method_keys("beta", "CPOConfig")
        self._written.add("data.packing")  # pairs are not packed
        if method == "simpo":
            config |= {"loss_type": "simpo", "cpo_alpha": 0.0}
        config["warmup_steps"] = recipe.training.warmup_ratio  # a value below 1 is a share of all steps
        config |= self._scheduler_arguments()
        config |= self._interval("training.checkpoint_every", {"save_strategy": "epoch"}, "save_steps")
        at_end = {"eval_strategy": "epoch"}
        config |= self._interval("training.eval_every", at_end, "eval_steps", eval_strategy="steps")
        if not has_validation:
            config["eval_strategy"] = "no"
        return config | {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}

    # -- settings

    def _keys(self, call: str) -> dict[str, Any]:
        """Return the keys that ``writes`` lists for ``call``, with their values.

        Their settings are marked as written.
        """
        keys = {}
        for name in self._trainer.writes[call]:
            key = name.rstrip("?")
            rule = rule_of(self._trainer, key)
            assert rule is not None and rule.to, key
            ours = get_setting(self._recipe, rule.to)
            if (rule.to, ours) == ("training.lr_scheduler", "wsd"):
                continue  # other schedulers take the number of decay steps
            if name.endswith("?") and ours == fields()[rule.to].default:
                self._written.add(rule.to)
            elif (theirs := _theirs(rule, ours)) is not None:
                keys[key] = theirs
                self._written.add(rule.to)
            elif ours == "auto":
                self._written.add(rule.to)  # the other trainer chooses a value too
        return keys

    def _method_keys(self, beta: str, simpo: str) -> dict[str, Any]:
        """Return the keys that set up the preference method; empty for a recipe without one."""
        recipe = self._recipe
        self._written |= {"training.preference_beta", "training.simpo_gamma"}
        if (traits := recipe.preference_traits) is None:
            return {}
        keys = {beta: recipe.training.preference_beta or traits.default_beta}
        return keys | (self._keys(simpo) if traits.has_margin else {})

    def _targets(self) -> Any:
        """Return the names of the adapted modules, or ``all-linear``."""
        lora = self._recipe.lora
        self._written.add("lora.train_embeddings")
        if ALL_LINEAR in lora.target_modules:
            if len(lora.target_modules) == 1:
                self._written.add("lora.target_modules")
            return ALL_LINEAR
        if all("." not in name for name in lora.target_modules):
            self._written.add("lora.target_modules")
        return [name.rpartition(".")[2] for name in lora.target_modules]

    def _scheduler_arguments(self) -> dict[str, Any]:
        """Return the scheduler's arguments besides its name."""
        training = self._recipe.training
        match training.lr_scheduler:
            case "polynomial":
                self._written.add("training.lr_power")
                return {"lr_scheduler_kwargs": {"power": training.lr_power, "lr_end": 0.0}}
            case "cosine_with_restarts":
                self._written.add("training.lr_cycles")
                return {"lr_scheduler_kwargs": {"num_cycles": training.lr_cycles}}
        return {}

    def _interval(self, setting: str, at_end: dict[str, Any], key: str, **with_steps: str) -> dict[str, Any]:
        self._written.add(setting)
        every = get_setting(self._recipe, setting)
        return {key: every, **with_steps} if every else at_end

    def _result(self, name: str, text: str) -> ExportedRecipe:
        settings = ((path, get_setting(self._recipe, path)) for path in fields())
        left_out = (
            LeftOut(path, value, "")
            for path, value in settings
            if path not in self._written and value != fields()[path].default
        )
        return ExportedRecipe(name, text, tuple(left_out))


def _theirs(rule: Rule, ours: Any) -> Any:
    """Return the other trainer's spelling of our value; None if it has none."""
    if not rule.values:
        return list(ours) if isinstance(ours, tuple) else ours
    for written, value in rule.values.items():
        if value == ours:
            return {"true": True, "false": False}.get(written, written)
    return None


def _arguments(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_literal(value)}" for key, value in keys.items()]


def _literal(value: Any) -> str:
    """Return a value as a Python literal, with strings in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str | list) else repr(value)


def _lines(arguments: Iterable[str], indent: int = 4) -> str:
    return "".join(f"{' ' * indent}{argument},\n" for argument in arguments)
