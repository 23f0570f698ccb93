"""``mcp``: the commands as tools of the Model Context Protocol, on stdin and stdout.

Each tool is a command of :data:`qlora_tui.cli.main.SUBCOMMANDS` with the arguments that its parser declares.
A call runs the command with ``--json`` in a separate process. A command that starts, writes or deletes
something requires two calls: the first replies with the command line and a code, and the second, with this
code, runs the command.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import secrets
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qlora_tui import __version__, worker
from qlora_tui.cli.command_tree import arguments_of, command_tree, is_list, needs_action
from qlora_tui.cli.main import subcommand
from qlora_tui.cli.subcommand import Subcommand
from qlora_tui.errors import UsageError
from qlora_tui.installation import install_command

if TYPE_CHECKING:
    import mcp_types as types

_TIMEOUT_S = 3600.0
"""Seconds after which a command is ended. A run that it started continues."""
_MOST_CHARACTERS = 200_000
"""Maximum length of the output that is returned."""
_CONFIRM = "confirm"
_INSTRUCTIONS = (
    "qlora-tui fine-tunes language models with QLoRA on this machine's GPU. `doctor` says whether it can "
    "train, `estimate` whether a recipe fits. A tool that changes something first replies with a plan: show "
    "it to the user, and call the tool again with the same arguments and the plan's `confirm`. A command "
    "cannot outlive its call: start runs with `train` and `detach`, watch them with `runs`, and start "
    "servers "
    "with `serve` and `background`."
)


@dataclass(frozen=True)
class CommandTool:
    """A command, or one of its actions, as a tool."""

    words: tuple[str, ...]
    """Words of the command, such as ``("runs", "delete")``."""
    help: str
    parser: argparse.ArgumentParser
    changes: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return "_".join(self.words)

    @cached_property
    def _actions(self) -> dict[str, argparse.Action]:
        """The arguments, by the names of their JSON properties."""
        return {
            action.option_strings[-1].lstrip("-").replace("-", "_")
            if action.option_strings
            else action.dest: action
            for action in arguments_of(self.parser)
            if action.dest != "json" and action.help != argparse.SUPPRESS
        }

    @property
    def may_change(self) -> bool:
        """Return whether this tool can start, write or delete something."""
        return self.changes is None or any(word in self.changes for word in (*self.words[1:], *self._actions))

    def does_change(self, arguments: dict[str, Any]) -> bool:
        """Return whether a call with these arguments starts, writes or deletes something."""
        if arguments.get("dry_run"):
            return False
        return self.changes is None or bool({*self.words[1:], *_given(arguments)} & set(self.changes))

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments."""
        properties = {name: _property(action) for name, action in self._actions.items()}
        if self.may_change:
            text = "code of the plan to carry out; without a code, the call only returns a plan"
            properties[_CONFIRM] = {"type": "string", "description": text}
        required = [
            name
            for name, action in self._actions.items()
            if action.required and (action.option_strings or action.nargs not in ("?", "*"))
        ]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    def argv(self, arguments: dict[str, Any]) -> list[str]:
        """Return the words of the command line. Raises UsageError for arguments that the schema rejects."""
        import jsonschema

        given = _given(arguments)
        validator = jsonschema.Draft202012Validator(self.schema())
        if wrong := next(validator.iter_errors(given), None):
            raise UsageError(
                "Wrong argument",
                what=f"{'.'.join([self.name, *map(str, wrong.path)])}: {wrong.message}.",
                fix=f"Arguments of {self.name}: {', '.join(self._actions) or 'none'}.",
            )
        options, positionals = [], []
        for name, action in self._actions.items():
            if name not in given:
                continue
            value = given[name]
            values = [str(each) for each in (value if isinstance(value, list) else [value])]
            if not action.option_strings:
                positionals += values
            elif action.nargs == 0:
                options.append(action.option_strings[-1])
            else:
                options += [f"{action.option_strings[-1]}={each}" for each in values]
        return [*self.words, *options, "--json", *(["--", *positionals] if positionals else [])]


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without those that are None, False or an empty list, which count as omitted."""
    # Compare by identity, because 0 and 0.0 equal False.
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and value is not False and value != []
    }


def _property(action: argparse.Action) -> dict[str, Any]:
    text = (action.help or "").replace("%%", "%")
    single: dict[str, Any] = {"type": "string"}
    if action.choices is not None:
        single = {"enum": [str(choice) for choice in action.choices]}
    elif action.nargs == 0:
        single = {"type": "boolean"}
    elif action.type is not None:
        single = {"type": ["string", "number"]}
    if is_list(action):
        single = {"type": "array", "items": single}
    return {**single, "description": text}


def command_tools() -> Iterator[CommandTool]:
    """Yield a tool for each command that is useful for programs, and for each of its actions.

    A command that does nothing without an action is not a tool itself.
    """
    for name, help_, parser in command_tree():
        words = tuple(name.split())
        command = subcommand(words[0])
        if command.for_programs and not needs_action(parser):
            yield CommandTool(words, help_, parser, command.changes)


class ToolServer:
    """Lists the tools and runs them."""

    def __init__(self) -> None:
        self._tools = {tool.name: tool for tool in command_tools()}
        self._secret = secrets.token_bytes()

    async def list_tools(self, context: Any, parameters: Any) -> types.ListToolsResult:
        """List all tools."""
        import mcp_types as types

        return types.ListToolsResult(
            tools=[
                types.Tool(
                    name=tool.name,
                    description=tool.help,
                    input_schema=tool.schema(),
                    annotations=types.ToolAnnotations(read_only_hint=not tool.may_change),
                )
                for tool in self._tools.values()
            ]
        )

    async def call_tool(self, context: Any, call: types.CallToolRequestParams) -> types.CallToolResult:
        """Run a command, or reply with the command line and a code if the command requires a second call."""
        arguments = dict(call.arguments or {})
        code = str(arguments.pop(_CONFIRM, ""))
        tool = self._tools.get(call.name)
        if tool is None:
            return _result(f"There is no tool {call.name}.", is_error=True)
        try:
            argv = tool.argv(arguments)
        except UsageError as problem:
            return _result(str(problem), is_error=True)
        if tool.does_change(arguments):
            expected = hmac.new(self._secret, json.dumps(argv).encode(), hashlib.sha256).hexdigest()[:16]
            if not code:
                plan = {"plan": shlex.join(["qlora-tui", *argv]), "does": tool.help, _CONFIRM: expected}
                return _result(json.dumps(plan, ensure_ascii=False))
            if not hmac.compare_digest(code, expected):
                return _result(
                    "This confirmation code does not belong to a plan with these arguments.", is_error=True
                )
        return await _run(argv)


async def _run(argv: list[str]) -> types.CallToolResult:
    """Run a command in a separate process, which ends with the call."""
    process = await asyncio.create_subprocess_exec(
        *worker.module_argv("qlora_tui"),
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=worker.subprocess_env(),
    )
    try:
        out, messages = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
    except TimeoutError:
        return _result(f"The command took more than {_TIMEOUT_S:,.0f} s and was ended.", is_error=True)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    text = out.decode(errors="replace")
    if process.returncode or not text:
        text += messages.decode(errors="replace")
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}\n… {len(text) - _MOST_CHARACTERS:,} characters more"
    return _result(text.strip(), is_error=process.returncode != 0)


def _result(text: str, *, is_error: bool = False) -> types.CallToolResult:
    import mcp_types as types

    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=is_error)


def run(args: argparse.Namespace) -> int:
    """Serve one client until it closes stdin."""
    try:
        from mcp.server import stdio
        from mcp.server.lowlevel import Server
    except ModuleNotFoundError as error:
        raise UsageError(
            "The tool server is not installed",
            what=f"The tool server needs the package {error.name}.",
            fix=f"Install it with `{install_command('qlora-tui[mcp]')}`.",
        ) from error
    tools = ToolServer()
    server: Any = Server(
        "qlora-tui",
        version=__version__,
        instructions=_INSTRUCTIONS,
        on_list_tools=tools.list_tools,
        on_call_tool=tools.call_tool,
    )

    async def serve() -> None:
        async with stdio.stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    asyncio.run(serve())
    return 0


SUBCOMMANDS = {"mcp": Subcommand(run, for_programs=False)}
