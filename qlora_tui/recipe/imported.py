"""Imports recipes of other trainers: axolotl, LLaMA-Factory, TRL, Unsloth, and peft adapters.

Files are parsed and never run. ``aliases.toml`` and ``trainers.toml`` define the meaning of each key; this
module finds the keys, and converts settings that need more than one key: quantization, data and steps. Keys
without a counterpart are reported with their values. A file that trains something that a recipe cannot
describe is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from qlora_tui.errors import UsageError, UserError
from qlora_tui.files import read_regular
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import ALL_LINEAR
from qlora_tui.recipe.toml import read_text, to_recipe
from qlora_tui.recipe.trainers import TABLES, LeftOut, Trainer, is_unneeded, nested, rule_of
from qlora_tui.recipe.validation import find_issues

_DATASETS = TABLES.datasets
_MAX_BYTES = 4_000_000
_MAX_DEPTH = 50
"""Maximum nesting depth of lists and tables in a YAML file. Settings of trainers have at most five levels."""
_SECRET_ENDINGS = ("token", "api_key", "password", "secret", "secrets")
"""Endings of keys whose values are never shown."""
_LONGEST_VALUE = 60
"""Maximum number of characters of a value in an error."""
_BITS = ("load_in_8bit", "load_in_4bit", "quantization_bit", "quant_config.quantization_bit")
_FOUR_BIT_TYPES = (
    "bnb_4bit_quant_type",
    "bnb_config_kwargs.bnb_4bit_quant_type",
    "quantization_type",
)


class Expression(str):
    """The source text of a value that would be known only by running the script."""

    __slots__ = ()


class _Call(NamedTuple):
    """A function call in a script."""

    owner: str
    """Text before the last dot: ``FastLanguageModel``."""
    name: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    """The keyword arguments: each is a plain value, with the script's constants substituted, or an
    :class:`Expression`.
    """


def _calls_of(text: str, names: Collection[str]) -> Iterator[_Call]:
    """Yield the calls of functions with these names, from any module.

    Raises SyntaxError, ValueError, RecursionError or MemoryError if the text is not Python.
    """
    tree = ast.parse(text)
    constants = {
        target.id: _literal(node.value, {})
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        if name in names:
            yield _Call(
                owner,
                name,
                tuple(_literal(argument, constants) for argument in node.args),
                {a.arg: _literal(a.value, constants) for a in node.keywords if a.arg is not None},
            )


def _literal(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    text = ast.unparse(node)
    if text.startswith("torch.") and isinstance(node, ast.Attribute):
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Expression(text)


class Taken(Struct, frozen=True):
    """A setting that was read from a key."""

    key: str
    value: Any
    setting: str
    ours: Any


class ImportedRecipe(Struct, frozen=True, kw_only=True):
    """A recipe read from another trainer's file."""

    trainer: str
    """Name of the trainer: ``axolotl``."""
    layer: dict[str, Any]
    """The file's settings over the defaults of the trainer that it was written for, as our settings."""
    taken: tuple[Taken, ...]
    left_out: tuple[LeftOut, ...]
    unneeded: tuple[str, ...]
    """Keys that do not change what is learned."""


def import_recipe(path: Path) -> ImportedRecipe:
    """Read a recipe from a YAML file, a Python script, or an adapter's folder or ``adapter_config.json``.

    Raises UserError if the file cannot be read, is not from a known trainer, or trains something that a
    recipe cannot describe.
    """
    if path.is_dir():
        path = path / "adapter_config.json"
    text = read_text(path)
    if path.suffix == ".py":
        return _Import(TABLES.trainers["script"], _script_keys(text, path), path).result()
    keys = dict(_flattened(_mapping(text, path)))
    marked = {name: sum(mark in keys for mark in trainer.marks) for name, trainer in TABLES.trainers.items()}
    name = max(marked, key=lambda name: marked[name])
    if marked[name] < 2:
        raise _unknown_file(path, "it has no settings of axolotl, LLaMA-Factory or peft")
    if name == "peft":
        keys |= _trainer_state(path.parent)
    return _Import(TABLES.trainers[name], keys, path).result()


def _mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            value = json.loads(text)
        else:
            import yaml  # importing takes a tenth of a second

            # A few lines of nested aliases can expand to more than fits in memory, and PyYAML's time grows
            # with the square of the depth.
            depth = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    raise ValueError("YAML aliases (*name) are not read")
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                if depth > _MAX_DEPTH:
                    raise RecursionError
            value = yaml.safe_load(text)
    except RecursionError:
        raise _unknown_file(path, "it is nested too deeply") from None
    except Exception as error:  # PyYAML raises several classes
        place = getattr(error, "problem_mark", None)
        line = f"line {place.line + 1}: " if place is not None else ""
        raise _unknown_file(path, f"{line}{getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise _unknown_file(path, "it contains no settings")
    return {str(key): item for key, item in value.items()}


def _flattened(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys whose value is not None, with their values.

    A key in a table is yielded as ``table.key`` if any trainer has rules for keys of that table.
    """
    for key, value in mapping.items():
        if value is None:
            continue
        dotted = any(f"{key}." in name for trainer in TABLES.trainers.values() for name in trainer.keys)
        if isinstance(value, dict) and dotted:
            yield from ((f"{key}.{inner}", item) for inner, item in value.items() if item is not None)
        else:
            yield key, value


def _trainer_state(folder: Path) -> dict[str, Any]:
    """Read the number of epochs and the batch size from a checkpoint's ``trainer_state.json``.

    ``training_args.bin`` is a pickle, and is never read.
    """
    state = _json_table(folder / "trainer_state.json")
    return {name: state[name] for name in ("num_train_epochs", "train_batch_size") if state.get(name)}


def _json_table(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file cannot be read or contains anything else."""
    try:
        table = json.loads(read_regular(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _script_keys(text: str, path: Path) -> dict[str, Any]:
    """Read the arguments of the calls that configure training."""
    script = TABLES.trainers["script"]
    keys: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    try:
        calls = list(_calls_of(text, script.calls))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unknown_file(path, f"it is not Python: {error}") from None
    for call in calls:
        loads_data = call.name == "load_dataset"
        if call.name == "from_pretrained" and "Model" not in call.owner:
            continue
        implied |= script.classes.get(call.name, {})
        if call.positional and (loads_data or call.name == "from_pretrained"):
            keys["load_dataset" if loads_data else "model"] = call.positional[0]
        for name, value in call.keywords.items():
            # Objects are passed from call to call: model=model, args=config, peft_config=peft_config.
            is_object = call.name.endswith("Trainer") and isinstance(value, Expression)
            if value is not None and not is_object:
                keys[f"load_dataset.{name}" if loads_data else name] = value
    return implied | keys


class _Import:
    """The import of one file: keys are taken one by one, and those left over have no counterpart."""

    def __init__(self, trainer: Trainer, keys: dict[str, Any], path: Path) -> None:
        self._trainer = trainer
        self._keys = keys
        self._path = path
        self._settings: dict[str, Any] = {}
        self._taken: list[Taken] = []
        self._left_out: list[LeftOut] = []
        self._unneeded: list[str] = []

    def result(self) -> ImportedRecipe:
        if self._trainer.required not in self._keys:
            raise self._refused(
                f"the file has no {self._trainer.required}, so it trains every weight, or nothing."
            )
        self._read_quantization()
        self._read_targets()
        self._read_data()
        self._read_steps()
        for key in list(self._keys):
            self._read(key)
        self._add_defaults()
        layer = nested(self._settings)
        to_recipe(layer, str(self._path))
        return ImportedRecipe(
            trainer=self._trainer.label,
            layer=layer,
            taken=tuple(self._taken),
            left_out=tuple(self._left_out),
            unneeded=tuple(self._unneeded),
        )

    # -- single keys

    def _read(self, key: str) -> None:
        rule = rule_of(self._trainer, key)
        value = self._keys.pop(key)
        if rule is None:
            if is_unneeded(key):
                self._unneeded.append(key)
            else:
                self._leave_out(key, value, "")
        elif (written := _written(value)) in map(_written, rule.off):
            self._unneeded.append(key)
        elif isinstance(value, Expression) and written not in rule.values:
            self._leave_out(key, value, "its value is known only when the script runs")
        elif rule.to and not rule.values:
            self._take(key, value, rule.to, _as_kind(value, rule.to))
        elif written in rule.values and rule.to:
            self._take(key, value, rule.to, rule.values[written])
        elif rule.refuse:
            raise self._refused(f"{key} is {shown(value)}, so the file trains {rule.refuse}.")
        else:
            why = rule.why or f"{rule.to} has no such value"
            self._leave_out(key, value, why)

    def _read_if_set(self, key: str) -> None:
        if key in self._keys:
            self._read(key)

    def _take(self, key: str, value: Any, setting: str, ours: Any) -> None:
        """Set a setting to the value of a key, or record why the setting cannot have this value."""
        section, _, name = setting.rpartition(".")
        if find_issues({section: {name: ours}}, ""):
            self._leave_out(key, value, f"{setting} cannot have this value")
            return
        self._settings[setting] = ours
        self._taken.append(Taken(key, _plain(value), setting, ours))

    def _leave_out(self, key: str, value: Any, why: str) -> None:
        shown = "(not shown)" if key.endswith(_SECRET_ENDINGS) else _plain(value)
        self._left_out.append(LeftOut(key, shown, why))

    def _pop(self, key: str) -> Any:
        return self._keys.pop(key, None)

    # -- settings that need several keys

    def _read_quantization(self) -> None:
        """Determine how the base is stored: in 4 or 8 bits, and for 4 bits the type."""
        for key in _BITS:
            self._read_if_set(key)
        for key in _FOUR_BIT_TYPES:
            if self._settings.get("quantization.method") == "nf4":
                self._read_if_set(key)
            self._pop(key)

    def _read_targets(self) -> None:
        """Determine the modules that LoRA adapts, and whether embedding and head are trained too.

        A regular expression of modules has no counterpart.
        """
        self._read_if_set("lora_target_linear")
        for key in ("lora_target_modules", "lora_target", "target_modules", "peft_config.target_modules"):
            if not (value := self._pop(key)):
                continue
            names = _names(value)
            if names is None:
                self._leave_out(key, value, "it is not a list of names")
                continue
            names = [{"all": ALL_LINEAR}.get(name, name) for name in names]
            if not all(name.replace("_", "").replace("-", "").replace(".", "").isalnum() for name in names):
                why = "a regular expression: name modules in lora.target_modules"
                self._leave_out(key, value, why)
                continue
            self._take(key, value, "lora.target_modules", names)
        for key in ("lora_modules_to_save", "modules_to_save", "additional_target"):
            if not (value := self._pop(key)):
                continue
            names = _names(value)
            if names is not None and {"embed_tokens", "lm_head"} >= set(names):
                self._take(key, value, "lora.train_embeddings", True)
            else:
                why = "only embedding and head are trained in full, with lora.train_embeddings"
                self._leave_out(key, value, why)

    def _read_steps(self) -> None:
        """Determine gradient accumulation, warmup, and the intervals of checkpoints and evaluations.

        Values in units that a recipe does not have are left out, as is a number of validation rows.
        """
        if total := self._pop("batch_size"):
            rows = self._keys.get("micro_batch_size")
            if isinstance(total, int) and isinstance(rows, int) and rows > 0:
                self._take("batch_size", total, "training.gradient_accumulation", max(1, total // rows))
            else:
                self._leave_out("batch_size", total, "it is not a multiple of micro_batch_size")
        if steps := self._pop("warmup_steps"):
            most = self._keys.get("max_steps")
            if isinstance(steps, int | float) and steps < 1:
                self._take("warmup_steps", steps, "training.warmup_ratio", steps)
            elif isinstance(steps, int | float) and isinstance(most, int) and most > steps:
                self._take("warmup_steps", steps, "training.warmup_ratio", round(steps / most, 4))
            else:
                why = "warmup is a share of the steps: set training.warmup_ratio"
                self._leave_out("warmup_steps", steps, why)
        for strategy, interval, setting in (
            ("save_strategy", "save_steps", "training.checkpoint_every"),
            ("eval_strategy", "eval_steps", "training.eval_every"),
            ("evaluation_strategy", "eval_steps", "training.eval_every"),
        ):
            how, every = self._pop(strategy), self._keys.get(interval)
            if how == "epoch":
                self._pop(interval)
                self._take(strategy, how, setting, 0)
            elif how == "no":
                self._pop(interval)
                why = "checkpoints and evaluations always happen at the end of each epoch"
                self._leave_out(strategy, how, why)
            elif isinstance(every, int) and every:
                self._take(interval, self._pop(interval), setting, every)
            elif every is not None:
                why = f"{setting} is a number of steps"
                self._leave_out(interval, self._pop(interval), why)
        for key in ("val_set_size", "val_size"):
            rows = self._keys.get(key)
            if isinstance(rows, int | float) and rows >= 1:
                why = "data.validation_fraction is a share of the rows, not a number"
                self._leave_out(key, self._pop(key), why)

    def _read_data(self) -> None:
        """Determine the data: axolotl's list, LLaMA-Factory's registry, or the data that a script loads."""
        sources: list[dict[str, Any]] = []
        datasets = self._pop("datasets")
        if datasets is not None:
            sources = [s for d in _list(datasets) if isinstance(d, dict) and (s := self._axolotl_source(d))]
        if value := self._pop("test_datasets"):
            self._leave_out("test_datasets", value, "name a file in data.validation_path")
        for key in ("dataset", "eval_dataset"):
            if isinstance(names := self._keys.get(key), str):
                found = self._registered(self._pop(key), self._keys.get("dataset_dir", "data"), key)
                if key == "dataset":
                    sources = found
                elif found:
                    self._take(key, names, "data.validation_path", found[0]["path"])
        if path := self._pop("train_dataset"):
            why = "name the files in data.sources"
            self._leave_out("train_dataset", path, why)
        if (path := self._pop("load_dataset")) is not None:
            sources = self._script_source(path)
        if sources:
            self._settings["data.sources"] = sources
            for source in sources:
                self._taken.append(Taken("dataset", source["path"], "data.sources", source["path"]))
        self._read_objective()

    def _read_objective(self) -> None:
        """Determine the training objective, if a stage or a loss names it."""
        stage, loss = self._pop("stage"), self._pop("pref_loss") or "sigmoid"
        if stage in ("rm", "ppo"):
            trained = "a reward model" if stage == "rm" else "a policy by PPO"
            raise self._refused(f"stage is {stage}, so the file trains {trained}.")
        if stage == "pt":
            self._take("stage", stage, "data.train_on", "everything")
        elif stage == "kto":
            self._take("stage", stage, "data.preferences", "kto")
        elif stage == "dpo":
            method = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"}.get(_written(loss))
            if method is None:
                raise self._refused(f"pref_loss is {loss}: the methods here are dpo, orpo, simpo and kto.")
            self._take("stage", stage, "data.preferences", method)
        if self._keys.get("loss_type") == "simpo":
            self._take("loss_type", self._pop("loss_type"), "data.preferences", "simpo")

    def _axolotl_source(self, dataset: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the source for one dataset of axolotl; None if the dataset has no path."""
        given = {key: value for key, value in dataset.items() if value is not None}
        path = self._path_of(given.pop("path", None), given)
        if path is None:
            return None
        source: dict[str, Any] = {"path": path}
        kind = given.pop("type", "")
        if isinstance(kind, dict):
            given |= {key: value for key, value in kind.items() if value is not None}
        elif format_ := _DATASETS.formats.get(re.split("[.:_]", str(kind))[0]):
            source["format"] = format_
        columns = {part: given.pop(key) for key, part in _DATASETS.fields.items() if key in given}
        if columns:
            source["columns"] = columns
        if "messages" in columns:
            source.setdefault("format", "messages")
        if "chosen" in columns or "rejected" in columns:
            source.pop("format", None)
        self._leave_out_of_data("datasets", given)
        return source

    def _registered(self, names: str, folder: Any, key: str) -> list[dict[str, Any]]:
        """Return the sources that LLaMA-Factory's ``dataset_info.json`` has under these names."""
        folders = [base / str(folder) for base in (Path.cwd(), *self._path.resolve().parents)]
        found = next((f for f in folders if (f / "dataset_info.json").is_file()), folders[0])
        registry = _json_table(found / "dataset_info.json")
        sources = []
        for name in (name.strip() for name in names.split(",")):
            entry = registry.get(name)
            if not isinstance(entry, dict):
                self._leave_out(key, name, "no dataset_info.json has this name: name a file in data.sources")
                continue
            file = entry.get("file_name")
            path = str(found / file) if isinstance(file, str) else entry.get("hf_hub_url")
            if not isinstance(path, str):
                self._leave_out(key, name, "it is neither a file nor on the Hub")
                continue
            columns = entry.get("columns")
            columns = columns if isinstance(columns, dict) else {}
            for part in _DATASETS.media:
                if part in columns:
                    self._leave_out(f"{key}.{part}", name, "only text is trained")
            source: dict[str, Any] = {"path": path}
            mapped = {_DATASETS.columns[part]: c for part, c in columns.items() if part in _DATASETS.columns}
            if not entry.get("ranking"):
                source["format"] = _DATASETS.formats.get(_written(entry.get("formatting", "alpaca")), "auto")
            elif "instruction" in mapped:
                mapped["prompt"] = mapped.pop("instruction")
            if mapped:
                source["columns"] = mapped
            sources.append(source)
        return sources

    def _script_source(self, path: Any) -> list[dict[str, Any]]:
        """Return the source that a script loads; empty if it is not a plain value."""
        prefix = "load_dataset."
        keys = [key for key in self._keys if key.startswith(prefix)]
        given = {key.removeprefix(prefix): self._pop(key) for key in keys}
        source = self._path_of(path, given)
        self._leave_out_of_data("load_dataset", given)
        if source is None:
            self._leave_out("load_dataset", path, "it is not a plain value")
            return []
        return [{"path": source}]

    def _path_of(self, path: Any, given: dict[str, Any]) -> str | None:
        """Return the path of a dataset, or of the file that a loader reads; None if it is not a text."""
        if path in _DATASETS.loaders and (files := given.get("data_files")):
            while isinstance(files, dict | list) and files:
                files = next(iter(files.values() if isinstance(files, dict) else files))
            del given["data_files"]
            path = files
        if not isinstance(path, str) or isinstance(path, Expression):
            return None
        next_to_file = self._path.resolve().parent / path
        return str(next_to_file) if not Path(path).exists() and next_to_file.exists() else path

    def _leave_out_of_data(self, where: str, given: dict[str, Any]) -> None:
        for key, value in given.items():
            if key not in _DATASETS.unneeded and (key, value) != ("split", "train"):
                self._leave_out(f"{where}.{key}", value, _DATASETS.why.get(key, ""))

    # -- the complete recipe

    def _add_defaults(self) -> None:
        for setting, value in self._trainer.defaults.items():
            self._settings.setdefault(setting, value)
        if self._trainer.alpha_per_rank and "lora.alpha" not in self._settings:
            self._settings["lora.alpha"] = self._settings["lora.rank"] * self._trainer.alpha_per_rank

    def _refused(self, what: str) -> UserError:
        return UsageError(
            "Not a LoRA training",
            what=f"{self._path.name}: {what}",
            fix="Import a recipe that trains a LoRA adapter on one GPU, or train this one with "
            f"{self._trainer.label}.",
        )


def _unknown_file(path: Path, why: str) -> UserError:
    return UsageError(
        "Cannot import",
        what=f"{path}: {why}.",
        fix="Name a YAML file of axolotl or LLaMA-Factory, a script with TRL or Unsloth, or an adapter.",
    )


def _names(value: Any) -> list[str] | None:
    """Return the names in a list or a comma-separated text; None for any other value."""
    names = value.split(",") if isinstance(value, str) and not isinstance(value, Expression) else value
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        return None
    stripped = [name.strip() for name in names]
    return sorted(stripped) if isinstance(value, set) else stripped


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _written(value: Any) -> str:
    """Return a value as ``trainers.toml`` spells it: ``true``, ``adamw_torch``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON represents it; a value of another kind becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str(value)  # also for an expression, which msgspec does not encode
    return value if isinstance(value, int | float | bool | None) else repr(value)


def shown(value: Any, longest: int = _LONGEST_VALUE) -> str:
    """Return a value as JSON of at most ``longest`` characters, for display."""
    text = json.dumps(_plain(value), ensure_ascii=False)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _as_kind(value: Any, setting: str) -> Any:
    """Convert a number, or the text of one, to the type of the setting. Other values stay unchanged.

    Texts are converted because YAML reads ``2e-5`` as text.
    """
    kind = fields()[setting].kind
    if kind in ("int", "float") and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if kind == "int" and number.is_integer() else number
    return value
