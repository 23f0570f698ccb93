"""The commands as tools, by the protocol's own client."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_tui.cli.main import SUBCOMMANDS, _with_action, command_parser
from qlora_tui.cli.main import main as run_command
from qlora_tui.cli.mcp_server import CommandTool, command_tools
from qlora_tui.errors import UsageError
from qlora_tui.installation import install_command
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import create_run

if TYPE_CHECKING:
    from mcp.client.session import ClientSession

pytestmark = pytest.mark.slow

TOOLS = {tool.name: tool for tool in command_tools()}


@asynccontextmanager
async def connected() -> AsyncIterator[ClientSession]:
    from mcp.client.session import ClientSession  # a second in each worker that collects these tests
    from mcp.client.stdio import StdioServerParameters, stdio_client

    server = StdioServerParameters(
        command=sys.executable, args=["-m", "qlora_tui", "mcp"], env=dict(os.environ), cwd=Path.cwd()
    )
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        yield session


async def called(session: ClientSession, tool: str, **arguments: Any) -> tuple[str, bool]:
    """The text of a result, and whether it is an error."""
    result: Any = await session.call_tool(tool, arguments)
    return result.content[0].text, bool(result.is_error)


async def test_commands_are_called_and_changes_are_confirmed() -> None:
    run = create_run(Recipe())
    async with connected() as session:
        listed = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert listed.keys() == TOOLS.keys()
        read_only = {
            name for name, tool in listed.items() if tool.annotations and tool.annotations.read_only_hint
        }
        assert read_only >= {"doctor", "estimate", "runs", "models", "presets_show"}
        assert read_only.isdisjoint(
            {"train", "runs_delete", "export_gguf", "stop", "download", "serve", "cache"}
        )

        text, failed = await called(session, "presets_reference")
        assert not failed and "lora.rank" in text
        text, failed = await called(session, "runs_check", run_id="no-such-run")
        assert failed and "no-such-run" in text
        text, failed = await called(session, "runs", color="red")
        assert failed and "color" in text
        text, failed = await called(session, "runs_trash", empty=0)
        assert failed and "runs_trash.empty" in text and "boolean" in text

        plan = json.loads((await called(session, "runs_rename", run_id=run.id, name="after"))[0])
        assert plan["plan"] == f"qlora-tui runs rename --json -- {run.id} after"
        refused = {"run_id": run.id, "name": "another", "confirm": plan["confirm"]}
        assert (await called(session, "runs_rename", **refused))[1]
        assert "after" not in (await called(session, "runs"))[0]
        _, failed = await called(session, "runs_rename", run_id=run.id, name="after", confirm=plan["confirm"])
        assert not failed
        assert '"after"' in (await called(session, "runs"))[0]


@pytest.mark.parametrize(
    ("name", "arguments", "argv"),
    [
        (
            "estimate",
            {"model": "m", "set": ["a=1", "b=2"]},
            ["estimate", "--model=m", "--set=a=1", "--set=b=2"],
        ),
        ("train", {"recipe": "--help", "detach": True}, ["train", "--detach"]),
        ("ask", {"run_id": "r", "request": "learning-rate", "value": 0.1}, ["ask"]),
        ("cache", {"clear": False}, ["cache"]),
    ],
)
def test_arguments_become_a_command_line(name: str, arguments: dict[str, Any], argv: list[str]) -> None:
    given = TOOLS[name].argv(arguments)
    values = [str(arguments[key]) for key in ("recipe", "run_id", "request", "value") if key in arguments]
    assert given == [*argv, "--json", *(["--", *values] if values else [])]


def test_what_changes_something_is_confirmed_unless_it_only_looks() -> None:
    def asks(name: str, **arguments: Any) -> bool:
        return TOOLS[name].does_change(arguments)

    assert asks("train") and not asks("train", dry_run=True)
    assert asks("runs_delete") and not asks("runs") and not asks("runs_check")
    assert asks("runs_check", repair=True) and asks("cache", clear="models") and not asks("cache")
    assert asks("import", output="x.toml") and not asks("import")


@pytest.mark.parametrize("value", [None, False, True, 0, 1, 0.0, "", "x", [], [0]])
@pytest.mark.parametrize(
    ("name", "argument"), [("runs_trash", "empty"), ("runs_check", "repair"), ("import", "output")]
)
def test_no_value_carries_out_a_change_without_a_plan(name: str, argument: str, value: object) -> None:
    arguments = {"file": "x.yaml", argument: value} if name == "import" else {argument: value}
    with suppress(UsageError):
        argv = TOOLS[name].argv(arguments)
        is_passed = any(word.startswith(f"--{argument}") for word in argv)
        assert TOOLS[name].does_change(arguments) == is_passed


def test_each_command_for_programs_is_a_tool() -> None:
    left_out = SUBCOMMANDS.keys() - {tool.words[0] for tool in TOOLS.values()}
    assert left_out == {"mcp", "completion", "demo", "store"}
    # They do nothing without an action, and each action that computes takes their GPU.
    assert TOOLS.keys().isdisjoint({"data", "export"})
    using_gpu = {name for name, tool in TOOLS.items() if "gpu" in tool.schema()["properties"]}
    assert using_gpu >= {"data_blame", "export_gguf", "export_hub", "sweep_start", "evaluate"}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_the_command_line_of_a_tool_is_one_that_its_parser_takes(tool: CommandTool) -> None:
    """With what is required, and each switch and choice."""
    schema = tool.schema()

    def value(name: str) -> Any:
        kind = schema["properties"][name]
        one = kind.get("items", kind)
        plain = True if one.get("type") == "boolean" else one.get("enum", ["x.y=1"])[0]
        return [plain] if kind is not one else plain

    required = {name: value(name) for name in schema["required"]}
    switches = [
        name
        for name, kind in schema["properties"].items()
        if kind.get("type") == "boolean" or ("enum" in kind and name not in required)
    ]
    for one in (None, *switches):
        argv = tool.argv(required | ({one: value(one)} if one else {}))
        command_parser(tool.words[0]).parse_args(_with_action(argv, tool.words[0]))


def test_without_the_library_its_installation_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    assert run_command(["mcp"]) == 2
    assert install_command("qlora-tui[mcp]") in capsys.readouterr().err
