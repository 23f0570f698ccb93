"""The commands as their parsers declare them.

Used for the reference, the tools of the MCP server, shell completion, and commands on another box.

argparse has no public access to the declarations of a parser. Only this module reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from qlora_tui.cli.main import SUBCOMMANDS, command_parser


def command_tree() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield name, help and parser of each command, followed by its actions, such as ``runs delete``."""
    for name, (_, help_) in SUBCOMMANDS.items():
        parser = subparsers(command_parser(name))[name]
        yield name, help_, parser
        for action, action_parser in subparsers(parser).items():
            yield f"{name} {action}", help_of(parser, action), action_parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's subcommands, by name."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def needs_action(parser: argparse.ArgumentParser) -> bool:
    """Return whether a command does nothing without one of its actions."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return any(action.required for action in actions)


def help_of(parser: argparse.ArgumentParser, name: str) -> str:
    """Return the help of a parser's subcommand."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return next((str(one.help) for one in action._choices_actions if one.dest == name), "")
    return ""


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a command, without ``--help`` and without its subcommands."""
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, left_out)]


def is_list(action: argparse.Action) -> bool:
    """Return whether an argument has several values: it may be repeated, or takes all words that follow."""
    return isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+")
