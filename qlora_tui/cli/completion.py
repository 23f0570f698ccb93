"""``completion``: shell completion of commands, options, runs, presets, models and settings.

The script that ``qlora-tui completion SHELL`` prints has the shell call ``qlora-tui`` again at each Tab,
with ``_ARGCOMPLETE`` in its environment; :func:`answer` then lists the matches. argcomplete is used rather
than shtab because values such as run ids exist only at that moment: shtab's scripts are static, and would
need a function in each shell's language for them. It is imported only here, so no other start is slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import NoReturn

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.visible import visible

SHELLS = ("bash", "zsh", "fish")


def run(args: argparse.Namespace) -> CommandResult:
    """Return the script for one shell."""
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
    """Return ``last``, then every run's name."""
    from qlora_tui.runs.directory import LAST, all_runs

    return (LAST, *(run.id for run in all_runs()))


def preset_names() -> Iterable[str]:
    """Return the names of the shipped presets and the user's."""
    from qlora_tui.recipe.presets import list_presets

    return (preset.name for preset in list_presets())


def model_names() -> Iterable[str]:
    """Return the models on this machine that can be trained."""
    from pathlib import Path

    from qlora_tui.catalog.local_models import list_local_models
    from qlora_tui.settings import load_settings

    folders = [Path(folder).expanduser() for folder in load_settings().model_folders]
    return (model.name for model in list_local_models(folders) if model.refusal is None)


def settings() -> Iterable[str]:
    """Return ``lora.rank=`` for every setting, followed by each value if there are few."""
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
"""Completions of an argument, by its ``dest``; with the command if ``dest`` alone is ambiguous."""


def _set_completers(parser: argparse.ArgumentParser) -> None:
    command = parser.prog.partition(" ")[2]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _set_completers(below)
        elif values := _VALUES.get(f"{command} {action.dest}") or _VALUES.get(action.dest):
            action.completer = _Completer(values)  # type: ignore[attr-defined]  # argcomplete reads it here


class _Completer:
    """Calls ``values`` at a Tab, and skips names that contain terminal control characters."""

    def __init__(self, values: Callable[[], Iterable[str]]) -> None:
        self._values = values

    def __call__(self, prefix: str, **_: object) -> list[str]:
        return [value for value in self._values() if value.startswith(prefix) and visible(value) == value]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read the script")


SUBCOMMANDS = {"completion": Subcommand(run, _arguments)}
