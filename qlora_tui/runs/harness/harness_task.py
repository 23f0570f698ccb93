"""Reads task files of lm-eval: data only, no code and no network.

lm-eval's own reader imports Python that a file names, downloads data sets and metrics, and renders templates
without a sandbox. Here a file is read as plain YAML, every key is checked against :mod:`.harness_keys`, rows
come from local files, and what is passed on is the checked values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.foreign_files import read_bounded
from qlora_tui.runs.harness import harness_keys as keys
from qlora_tui.runs.harness.harness_templates import UnsafeTemplateError, check_template

_MAX_BYTES = 1 << 20
_MAX_INCLUDES = 5
_MAX_SHOTS = 100
_MAX_NEW_TOKENS = 4096
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class HarnessTask(Struct, frozen=True):
    """One task that may be run."""

    name: str
    path: Path
    config: dict[str, Any]
    """What lm-eval reads of the file, checked; without its rows."""
    data_files: dict[str, tuple[Path, ...]]
    """Files of each split."""


def read_harness_tasks(path: Path) -> list[HarnessTask]:
    """Read one task file, or all ``.yaml`` and ``.yml`` files of a folder that name a task.

    Raises:
        UserError: there is none, one cannot be read, or one holds what is refused.
    """
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
        tasks = [task for each in files if (task := _read_task(each, is_alone=False)) is not None]
    else:
        tasks = [task for task in [_read_task(path, is_alone=True)] if task is not None]
    if not tasks:
        raise UserError(
            "No task",
            what=f"{path} holds no task file of lm-eval.",
            fix="Name a .yaml file with a `task:` key, or a folder of them.",
            exit_code=EXIT_USAGE,
        )
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise _refused(
                task.path, f"task: {task.name}", "Another file has this name.", "Rename one of them."
            )
    return tasks


def _read_task(path: Path, *, is_alone: bool) -> HarnessTask | None:
    """Read one file; None for a file of a folder that only others include."""
    config = _load(path, 0)
    if "task" not in config and not is_alone and not set(config) & set(keys.REFUSED):
        return None
    for key, value in config.items():
        _check_key(path, key, value)
    name = config.get("task")
    if not isinstance(name, str) or not name:
        raise _refused(path, "task", "It must be the name of one task.", "Write `task: my_task`.")
    output = config.setdefault("output_type", "generate_until")
    if output not in keys.METRICS:
        raise _refused(
            path,
            f"output_type: {output}",
            "It has no value for each row.",
            f"Use one of {', '.join(keys.METRICS)}.",
        )
    _check_metrics(path, config, output)
    _check_filters(path, config)
    _check_generation(path, config.get("generation_kwargs") or {})
    _check_fewshot(path, config)
    data_files = _data_files(path, config)
    for key in _SPLITS:
        if config.get(key) is not None and config[key] not in data_files:
            known = ", ".join(data_files)
            raise _refused(path, f"{key}: {config[key]}", f"The data has {known}.", "Name one of these.")
    if config.get("test_split") is None and config.get("validation_split") is None:
        raise _refused(path, "test_split", "It is missing.", f"Name one of {', '.join(data_files)}.")
    passed = {key: value for key, value in config.items() if key in (*keys.PLAIN, *keys.TEMPLATES)}
    for key in ("include", "dataset_path", "dataset_kwargs"):
        passed.pop(key, None)
    return HarnessTask(name=name, path=path, config=passed, data_files=data_files)


def _check_key(path: Path, key: str, value: Any) -> None:
    if key in keys.REFUSED:
        if key == "unsafe_code" and value in (None, False):
            return
        raise _refused(path, key, *keys.REFUSED[key])
    if key in keys.TEMPLATES:
        _check_templates(path, key, value)
    elif key in keys.IGNORED:
        if key in keys.HARMLESS and value not in keys.HARMLESS[key]:
            raise _refused(path, f"{key}: {value}", "A local task has no such thing.", "Remove the key.")
    elif key not in keys.PLAIN:
        raise _refused(path, key, "qlora-tui does not pass this key on.", "Remove it.")


def _check_templates(path: Path, key: str, value: Any) -> None:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, str):
            try:
                check_template(each)
            except UnsafeTemplateError as error:
                raise _refused(
                    path,
                    key,
                    f"Its template is not rendered: {error}.",
                    "Read columns of the row by their names.",
                ) from error
        elif not isinstance(each, int | float | None):
            raise _refused(path, key, "It is no text, number or list of them.", "Write a template.")


def _check_metrics(path: Path, config: dict[str, Any], output: str) -> None:
    allowed = keys.METRICS[output]
    given = config.get("metric_list")
    if given is None:
        given = [{"metric": name} for name in keys.DEFAULT_METRICS[output]]
    for entry in _entries(path, "metric_list", given):
        name = entry.get("metric")
        if name not in allowed:
            raise _refused(
                path,
                f"metric_list: {name}",
                "It has no value for each row, or is downloaded.",
                f"With {output}, use {', '.join(allowed)}.",
            )
        if unknown := next((key for key in entry if key not in keys.METRIC_KEYS), None):
            raise _refused(path, f"metric_list: {unknown}", "It is not passed on.", "Remove it.")
        if entry.setdefault("aggregation", "mean") != "mean":
            raise _refused(
                path, f"aggregation: {entry['aggregation']}", "Only means are compared.", "Use mean."
            )
        if entry.setdefault("higher_is_better", True) is not True:
            raise _refused(path, "higher_is_better", "Higher is better in these metrics.", "Use true.")
    config["metric_list"] = given


def _check_filters(path: Path, config: Mapping[str, Any]) -> None:
    for entry in _entries(path, "filter_list", config.get("filter_list") or []):
        if not isinstance(entry.get("name"), str):
            raise _refused(path, "filter_list", "A filter has no name.", "Give it one.")
        for step in _entries(path, "filter_list", entry.get("filter") or []):
            if step.get("function") not in keys.FILTERS:
                raise _refused(
                    path,
                    f"filter_list: {step.get('function')}",
                    "This filter is not passed on.",
                    f"Use one of {', '.join(keys.FILTERS)}.",
                )


def _check_generation(path: Path, given: Any) -> None:
    if not isinstance(given, dict):
        raise _refused(path, "generation_kwargs", "It is no table.", "Write keys and values.")
    if unknown := next((key for key in given if key not in keys.GENERATION), None):
        raise _refused(
            path,
            f"generation_kwargs: {unknown}",
            "It is not passed on.",
            f"Use {', '.join(keys.GENERATION)}.",
        )
    if given.get("do_sample") not in (None, False) or given.get("temperature") not in (None, 0):
        raise _refused(path, "do_sample", "Answers are compared greedily.", "Use do_sample: false.")
    for key in keys.MAX_NEW_TOKENS_KEYS:
        if key in given and (type(given[key]) is not int or not 0 < given[key] <= _MAX_NEW_TOKENS):
            raise _refused(path, f"{key}: {given[key]}", f"It is not 1 to {_MAX_NEW_TOKENS:,}.", "Lower it.")
    until = given.get("until", [])
    if not all(isinstance(each, str) for each in (until if isinstance(until, list) else [until])):
        raise _refused(
            path, "until", "It is no text or list of texts.", "Write the texts that end an answer."
        )


def _check_fewshot(path: Path, config: Mapping[str, Any]) -> None:
    shots = config.get("num_fewshot")
    if shots is not None and (type(shots) is not int or not 0 <= shots <= _MAX_SHOTS):
        raise _refused(path, f"num_fewshot: {shots}", f"It is not 0 to {_MAX_SHOTS}.", "Lower it.")
    given = config.get("fewshot_config") or {}
    if not isinstance(given, dict):
        raise _refused(path, "fewshot_config", "It is no table.", "Write keys and values.")
    for key, value in given.items():
        if key in keys.TEMPLATES:
            _check_templates(path, f"fewshot_config: {key}", value)
        elif key not in keys.FEWSHOT:
            why, fix = keys.REFUSED.get(key, ("It is not passed on.", "Remove it."))
            raise _refused(path, f"fewshot_config: {key}", why, fix)
    if given.get("sampler", "default") not in keys.SAMPLERS:
        raise _refused(
            path, f"sampler: {given['sampler']}", "It names code.", f"Use {' or '.join(keys.SAMPLERS)}."
        )
    if not isinstance(given.get("samples", []), list):
        raise _refused(path, "fewshot_config: samples", "It is no list of rows.", "Write the rows.")


def _data_files(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    loader, given = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if loader not in keys.LOADERS:
        raise _refused(
            path,
            f"dataset_path: {loader}",
            "It is a data set of the Hub, a script or a format that is not read.",
            "Save rows as JSONL. Write `dataset_path: json`, `dataset_kwargs: {data_files: {test: FILE}}`.",
        )
    if not isinstance(given, dict):
        raise _refused(path, "dataset_kwargs", "It is no table.", "Write `data_files: {test: FILE}`.")
    if unknown := next((key for key in given if key != "data_files"), None):
        raise _refused(path, f"dataset_kwargs: {unknown}", "It may run code or download.", "Remove it.")
    named = given.get("data_files")
    splits = named if isinstance(named, dict) else {"train": named}
    return {str(split): tuple(_local_files(path, files)) for split, files in splits.items()}


def _local_files(path: Path, named: Any) -> Iterator[Path]:
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or not name or "://" in name:
            raise _refused(path, f"data_files: {name}", "It is no local file.", "Save it, and name the file.")
        file = path.parent / Path(name).expanduser()
        if not file.is_file():
            raise _refused(
                path, f"data_files: {name}", f"There is no {file}.", "Name a file, relative to the task file."
            )
        yield file


def _entries(path: Path, key: str, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise _refused(path, key, "It is no list of tables.", "Write one table for each.")
    return given


def _load(path: Path, depth: int) -> dict[str, Any]:
    """The keys of a file, over those of the files that it includes."""
    try:
        text = read_bounded(path, _MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            "The task cannot be read",
            what=f"{path}: {reason}.",
            fix="Name a .yaml file of lm-eval, or a folder of them.",
            exit_code=EXIT_USAGE,
        ) from error
    config = _parse(path, text)
    included = config.get("include") or []
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str) or depth == _MAX_INCLUDES:
            raise _refused(path, f"include: {name}", "It is no file, or includes itself.", "Copy its keys.")
        config = _load(path.parent / name, depth + 1) | config
    return config


def _parse(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise _refused(path, "*", "Aliases may grow without bound.", "Write the values out.")
        config = yaml.load(text, Loader=yaml.SafeLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        tag = getattr(error, "problem", None) or str(error)
        if "!function" in tag:
            raise _refused(
                path,
                "!function",
                "It names Python code, which a task file must not choose.",
                "Use a template.",
            ) from error
        raise _refused(path, "", f"It is no YAML that is read: {tag}.", "Correct the file.") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise _refused(path, "", "It is no table of keys and values.", "Write `task: my_task` and so on.")
    return config


def _refused(path: Path, key: str, why: str, fix: str) -> UserError:
    where = f"{path}: {key}" if key else f"{path}"
    return UserError(
        "The task is not run", what=f"{where} is refused.", why=why, fix=fix, exit_code=EXIT_USAGE
    )
