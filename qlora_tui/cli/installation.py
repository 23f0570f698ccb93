"""This installation: ``doctor`` checks it, ``locate`` lists its folders, ``cache`` lists or clears the cache,
and ``completion`` prints a script for a shell.

A shell asks this program for completions at each press of Tab, because values such as run ids exist only at
that moment.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qlora_tui import paths
from qlora_tui.cli.command_tree import arguments_of, subparsers
from qlora_tui.cli.subcommand import CommandResult, Subcommand, checks_as_data, format_checks, format_table
from qlora_tui.errors import EXIT_FAILURE, UserError
from qlora_tui.files import size_of
from qlora_tui.formatting import format_bytes
from qlora_tui.publishing import discard
from qlora_tui.visible import visible

KINDS = {
    "quantized": (
        "4-bit base weights, read by later runs and chats instead of quantizing again",
        r".+-[0-9a-f]{16}",
    ),
    "models": (
        "16-bit weights converted from GGUF files; runs on these files need them again",
        r".+-[0-9a-f]{12,20}|SmolLM2-135M-Instruct",
    ),
    "gguf-tokenizers": ("tokenizers of GGUF files that have not been converted yet", r".+-[0-9a-f]{20}"),
    "counted": ("lengths of samples, from which the steps of a run are counted", r"[0-9a-f]{64}\.json"),
    "tokenized": ("data as token ids", r"[0-9a-f]{32}"),
    "datasets": ("facts about Hub datasets", r".+\.json"),
    "base-answers": (
        "answers of base models to general prompts, against which evaluations measure forgetting",
        r".+-[0-9a-f]{16}\.safetensors",
    ),
    "task-answers": (
        "answers of bases and adapters to validation prompts, read by later evaluations",
        r".+-[0-9a-f]{16}\.jsonl",
    ),
    "configs": ("config.json of Hub models, for estimates", r".+\.json"),
    "descriptions": ("architectures of models, read from transformers", r"[0-9a-f]{64}\.json"),
    "findings": ("checks of data files", r"[0-9a-f]{32}(?:[0-9a-f]{32})?\.json"),
    "traces": ("steps of models traced for exact memory estimates", r"[0-9a-f]{64}\.json"),
}
"""Folders of the cache: a description, and a pattern of the names that this program uses there. Other
names are neither listed nor deleted."""
SHELLS = ("bash", "zsh", "fish")


def run_doctor(args: argparse.Namespace) -> CommandResult:
    """Check this machine and the libraries, in the order in which problems would make a run fail."""
    # Completion loads this module at each Tab and does not need these modules.
    from qlora_tui.runs.doctor import CheckKind, check_libraries, check_system

    checks = check_system()
    # Report one error for one cause: a trainer would reject the same GPU.
    without_gpu = any(check.kind is CheckKind.GPU and check.outcome == "error" for check in checks)
    checks += check_libraries(on_cpu=without_gpu)
    failed = any(check.outcome == "error" for check in checks)
    verdict = "Not ready to train: fix the errors above." if failed else "Ready to train."
    return CommandResult(
        data={"ok": not failed, "checks": checks_as_data(checks)},
        text="\n".join([*format_checks(checks), verdict]),
        exit_code=EXIT_FAILURE if failed else 0,
    )


def run_locate(args: argparse.Namespace) -> CommandResult:
    """Return the folders of settings, presets, themes, runs and cache."""
    places = {
        "config": paths.config_dir(),
        "presets": paths.user_presets_dir(),
        "themes": paths.user_themes_dir(),
        "shipped_presets": paths.shipped_dir("presets"),
        "shipped_themes": paths.shipped_dir("themes"),
        "state": paths.state_dir(),
        "runs": paths.runs_dir(),
        "cache": paths.cache_dir(),
    }
    width = max(map(len, places))
    return CommandResult(
        data={name: str(path) for name, path in places.items()},
        text="\n".join(f"{name.replace('_', ' '):<{width}}  {path}" for name, path in places.items()),
    )


@dataclass(frozen=True)
class CachedItem:
    """One file or folder of the cache."""

    kind: str
    path: Path
    size_bytes: int
    used_at: float
    """Unix time of the last use, or of the last write if the use is unknown."""


def run_cache(args: argparse.Namespace) -> CommandResult:
    """List the cache; with ``--clear``, delete one kind. Raises UserError if it cannot be deleted."""
    items = list_items()
    if args.clear is not None:
        items = [item for item in items if item.kind == args.clear]
        _delete_items(items)
    total = sum(item.size_bytes for item in items)
    data = {
        "cleared": args.clear is not None,
        "folder": str(paths.cache_dir()),
        "total_bytes": total,
        "items": [
            {
                "kind": item.kind,
                "path": str(item.path),
                "size_bytes": item.size_bytes,
                "used_at": item.used_at,
            }
            for item in items
        ],
    }
    if args.clear is not None:
        return CommandResult(data, f"Deleted {format_bytes(total)} of {args.clear}: {KINDS[args.clear][0]}.")
    return CommandResult(data, _cache_table(items, total))


def list_items() -> list[CachedItem]:
    """Return the items of the cache that match :data:`KINDS`, by kind, and the largest of each kind first."""
    items = []
    for kind, (_, names) in KINDS.items():
        folder = paths.cache_dir() / kind
        entries = folder.iterdir() if folder.is_dir() else ()
        entries_of_kind = [
            CachedItem(kind, path, size_of(path), path.stat().st_mtime)
            for path in entries
            if re.fullmatch(names, path.name) and not path.is_symlink()
        ]
        items += sorted(entries_of_kind, key=lambda item: -item.size_bytes)
    return items


def _delete_items(items: list[CachedItem]) -> None:
    for item in items:
        try:
            if item.path.is_dir():
                discard(item.path)
            else:
                item.path.unlink()
        except OSError as error:
            raise UserError(
                "Cannot clear the cache",
                what=f"{item.path} cannot be deleted: {error.strerror or error}.",
                fix="Check the permissions of the folder.",
            ) from error


def _cache_table(items: list[CachedItem], total: int) -> str:
    if not items:
        return f"The cache is empty: {paths.cache_dir()}"
    rows = [
        [item.kind, item.path.name, format_bytes(item.size_bytes), _age(time.time() - item.used_at)]
        for item in items
    ]
    kinds = dict.fromkeys(item.kind for item in items)
    explained = [f"{kind}: {KINDS[kind][0]}. Delete with `qlora-tui cache --clear {kind}`." for kind in kinds]
    lines = [
        format_table(rows, ["kind", "name", "size", "used"]),
        "",
        f"{format_bytes(total)} in total",
        "",
    ]
    return "\n".join([*lines, *explained])


def _age(seconds: float) -> str:
    hours = seconds / 3600
    return "today" if hours < 24 else f"{hours / 24:.0f} days ago"


def run_completion(args: argparse.Namespace) -> CommandResult:
    """Return the completion script for a shell."""
    from argcomplete.shell_integration import shellcode

    script = shellcode(["qlora-tui"], shell=args.shell).strip()
    return CommandResult(data={"shell": args.shell, "script": script}, text=script)


def answer(parser: argparse.ArgumentParser) -> NoReturn:
    """Write the completions of ``COMP_LINE`` to descriptor 8, which the shell reads, and exit."""
    import argcomplete

    _set_completers(parser)
    argcomplete.autocomplete(parser, always_complete_options=False)
    raise AssertionError("argcomplete ends the process where _ARGCOMPLETE is set")


def run_names() -> Iterable[str]:
    """Return ``last`` and the id of every run."""
    from qlora_tui.runs.directory import LAST, all_runs

    return (LAST, *(run.id for run in all_runs()))


def preset_names() -> Iterable[str]:
    """Return the names of the shipped presets and of the user's presets."""
    from qlora_tui.recipe.presets import list_presets

    return (preset.name for preset in list_presets())


def model_names() -> Iterable[str]:
    """Return the models on this machine whose weights can be used. Some of them, such as models without a
    tokenizer, cannot be trained.
    """
    from pathlib import Path

    from qlora_tui.catalog.local_models import list_local_models
    from qlora_tui.settings import load_settings

    folders = [Path(folder).expanduser() for folder in load_settings().model_folders]
    return (model.name for model in list_local_models(folders) if model.loading_refusal is None)


def settings() -> Iterable[str]:
    """Return ``KEY=`` for every setting, or ``KEY=VALUE`` for each value if the setting has fixed choices."""
    from qlora_tui.recipe.fields import fields

    for path, field in fields().items():
        yield from (f"{path}={choice}" for choice in field.choices or ("",))


_VALUES: dict[str, Callable[[], Iterable[str]]] = {
    "run_id": run_names,
    "preset": preset_names,
    "model": model_names,
    "sets": settings,
    "presets show name": preset_names,
}
"""Functions that return the completions of an argument, keyed by its ``dest``, or by command and ``dest`` if
``dest`` alone is ambiguous.
"""


def _set_completers(parser: argparse.ArgumentParser) -> None:
    command = parser.prog.partition(" ")[2]
    for below in subparsers(parser).values():
        _set_completers(below)
    for action in arguments_of(parser):
        if values := _VALUES.get(f"{command} {action.dest}") or _VALUES.get(action.dest):
            action.completer = _Completer(values)  # type: ignore[attr-defined]  # argcomplete reads it here


class _Completer:
    """Calls ``values`` when Tab is pressed, and skips names that contain terminal control characters."""

    def __init__(self, values: Callable[[], Iterable[str]]) -> None:
        self._values = values

    def __call__(self, prefix: str, **_: object) -> list[str]:
        return [value for value in self._values() if value.startswith(prefix) and visible(value) == value]


SUBCOMMANDS = {
    "doctor": Subcommand(run_doctor, uses_gpu=True, changes=()),
    "locate": Subcommand(run_locate, changes=()),
    "cache": Subcommand(
        run_cache,
        lambda parser: parser.add_argument(
            "--clear", choices=list(KINDS), help="delete everything of this kind"
        ),
        changes=("clear",),
    ),
    "completion": Subcommand(
        run_completion,
        lambda parser: parser.add_argument(
            "shell", choices=SHELLS, help="the shell that will read the script"
        ),
        for_programs=False,
    ),
}
