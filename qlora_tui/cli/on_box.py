"""Runs a command on another box: ``qlora-tui --host BOX COMMAND …``.

ssh runs the command there, and passes on its arguments, input, output and exit code. Files that the command
reads are sent first and named by their hash; files that it writes stay on the box.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from qlora_tui import paths
from qlora_tui.cli.command_tree import arguments_of, subparsers
from qlora_tui.cli.subcommand import ProgressLine, add_recipe_arguments, input_path, recipe_from_args
from qlora_tui.cli.sweep import sheet_from_args
from qlora_tui.errors import UsageError
from qlora_tui.files import atomic_write
from qlora_tui.publishing import new_draft
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.toml import dump
from qlora_tui.remote import uploads
from qlora_tui.remote.ssh import Box

_HERE = ("import", "completion", "store")
"""Commands that only concern this machine, or that only the app starts on a box."""
_PIECE_BYTES = 1 << 16


def run_on_box(box: Box, argv: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run a command on the box and return its exit code.

    Args:
        box: The box.
        argv: The command, without ``--host``.
        args: The parsed arguments of the command.
        parser: The parser of all commands.

    Raises:
        UserError: The box cannot be reached, a file cannot be sent, or the command cannot run on a box.
    """
    if args.verb in _HERE:
        raise UsageError(
            "This command cannot be run on another machine",
            what=f"`{args.verb}` works only on this machine.",
            fix="Run it without --host.",
        )
    if hasattr(args, "recipe") and hasattr(args, "sets"):
        argv = _with_recipe(box, argv, args, parser)
    for value in _inputs(args, parser):
        words = (value, f"={value}")
        if Path(value).exists() and any(word.endswith(words) for word in argv):
            there = _send(box, Path(value))
            argv = [there if word == value else word.replace(words[1], f"={there}") for word in argv]
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _in_terminal(box, argv)
    channel = box.open_program(*argv, stdin=None)
    try:
        while piece := os.read(channel.output.fileno(), _PIECE_BYTES):
            # The output of the command on the box is already safe for a terminal.
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), piece)
        return channel.exit_code()
    finally:
        channel.close()


def _in_terminal(box: Box, argv: list[str]) -> int:
    """Run a command on the box with this terminal; return its exit code."""
    import subprocess

    channel = box.open_program("--version")
    channel.output.read()
    channel.close()
    return subprocess.run(box.program_argv(*argv, terminal=True), check=False).returncode


def _inputs(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the paths of files that the command reads."""
    command = subparsers(parser)[args.verb]
    below = subparsers(command)
    chosen = [below[value] for value in vars(args).values() if isinstance(value, str) and value in below]
    for action in [action for each in (command, *chosen) for action in arguments_of(each)]:
        if action.type is input_path:
            value = getattr(args, action.dest, None) or []
            yield from [value] if isinstance(value, str) else value


def _with_recipe(
    box: Box, argv: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> list[str]:
    """Send the recipe and its data; return the command with the sent recipe in place of the options."""
    sheet = sheet_from_args(args) if args.verb == "sweep" else None
    recipe = recipe_from_args(args) if sheet is None else sheet.recipe
    local = with_absolute_paths(recipe).data
    sources = tuple(msgspec.structs.replace(source, path=_sent(box, source.path)) for source in local.sources)
    data = msgspec.structs.replace(local, sources=sources, validation_path=_sent(box, local.validation_path))
    recipe = msgspec.structs.replace(recipe, data=data)
    text = dump(recipe) if sheet is None else msgspec.structs.replace(sheet, recipe=recipe).dump()
    there = _send_text(box, text)
    options = argparse.ArgumentParser(add_help=False)
    add_recipe_arguments(options)
    at = argv.index(args.verb) + 1
    if argv[at:] and argv[at] in subparsers(subparsers(parser)[args.verb]):
        at += 1
    _, rest = options.parse_known_args(argv[at:])
    if args.recipe:
        rest.remove(args.recipe)
    return [*argv[:at], there, *rest]


def _sent(box: Box, path: str) -> str:
    return _send(box, Path(path)) if path and Path(path).exists() else path


def _send(box: Box, path: Path) -> str:
    with ProgressLine() as line:
        return uploads.send(
            box, path, lambda done, size: line.show_share(done, size, f"bytes of {path.name}")
        )


def _send_text(box: Box, text: str) -> str:
    with new_draft(paths.cache_dir()) as folder:
        atomic_write(folder / "recipe.toml", text)
        return uploads.send(box, folder / "recipe.toml")
