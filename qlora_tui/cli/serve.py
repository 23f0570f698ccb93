"""``serve``: an OpenAI-compatible HTTP server for runs, their checkpoints and their base."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shlex
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from qlora_tui.cli.subcommand import (
    CommandResult,
    ProgressLine,
    Subcommand,
    positive_float,
    print_result,
    whole_number,
)
from qlora_tui.errors import UsageError
from qlora_tui.formatting import name_some
from qlora_tui.installation import install_command
from qlora_tui.runs.directory import RunDir, find_run
from qlora_tui.runs.exports import read_exports
from qlora_tui.runs.servers import (
    LOOPBACK,
    ServerStatus,
    running_servers,
    start_in_background,
    stop_server,
)

_PORT = 8000
KEY_VARIABLE = "QLORA_TUI_API_KEY"
"""Environment variable for the API key. An option is less safe: every user can read command lines."""


def run(args: argparse.Namespace) -> CommandResult | int:
    """Serve until a signal arrives, start a server in the background, stop a server, or print commands."""
    if args.stop:
        return _stop(args.port)
    try:
        from qlora_tui.serving.model_names import RunsToServe
        from qlora_tui.serving.server import Server
    except ModuleNotFoundError as error:
        raise UsageError(
            "The server is not installed",
            what=f"`qlora-tui serve` needs the package {error.name}.",
            fix=f"Install it with `{install_command('qlora-tui[serve]')}`.",
        ) from error
    runs = RunsToServe([find_run(name) for name in args.runs], with_others=args.all)
    first = runs.now()[0]
    if args.print_commands:
        return _commands_of_others(first)
    key = args.api_key or os.environ.get(KEY_VARIABLE, "")
    if args.background:
        return _start_result(start_in_background(_arguments_of(args), {KEY_VARIABLE: key}), first)
    server = Server(
        runs,
        host=args.listen_on,
        port=_PORT if args.port is None else args.port,
        api_key=key,
        aliases=dict(args.alias),
        idle_unload_s=args.idle_unload * 60 if args.idle_unload else None,
    )
    print_result(_start_result(server.status, first), as_json=args.json)
    with ProgressLine() as line:
        server.run(partial(_show_state, line))
    return 0


def _show_state(line: ProgressLine, status: ServerStatus) -> None:
    words = {"ready": "The model is loaded.", "unloaded": "The model is not loaded."}
    text = status.detail or words.get(status.state, "")
    if text:
        line.show(text, is_due=status.state != "loading")


def _start_result(status: ServerStatus, run: RunDir) -> CommandResult:
    """Return how clients reach a running server. The key is never printed, because output may go to a log."""
    key = f' -H "Authorization: Bearer $(cat {shlex.quote(status.key_file)})"' if status.key_file else ""
    body = json.dumps({"model": status.default_model, "messages": [{"role": "user", "content": "Hello"}]})
    url = shlex.quote(f"{status.address}/chat/completions")
    lines = [
        f"Serving {name_some(status.models)} on {status.address}",
        *([f"  {run.id} has no adapter yet: only its base answers."] if len(status.models) == 1 else []),
        f"  curl {url}{key} -H 'Content-Type: application/json' \\",
        f"    -d {shlex.quote(body)}",
    ]
    address = urlsplit(status.address)
    if status.is_local:
        tunnel = f"{status.port}:{address.netloc}"
        lines.append(
            f"  From a laptop: ssh -N -L {tunnel} {getpass.getuser()}@{_own_host()}, "
            "then the same address there."
        )
    elif address.hostname == LOOPBACK:
        lines.append(f"  From other machines: http://{_own_host()}:{status.port}{address.path}, without TLS")
    if status.key_file:
        lines.append(f"  The API key is in {status.key_file}.")
    lines.append(f"  For vLLM or llama.cpp: qlora-tui serve {run.id} --print-commands")
    return CommandResult(msgspec.to_builtins(status), "\n".join(lines))


def _own_host() -> str:
    """Return the address by which this session was reached, or else the name of this machine."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return connection[2] if len(connection) == 4 else os.uname().nodename


def _stop(port: int | None) -> CommandResult:
    """Stop the server on a port; without a port, stop the only server."""
    running = running_servers()
    others = "\n".join(f"  --port {each.port}: {name_some(each.models)}" for each in running)
    if port is None and len(running) > 1:
        raise UsageError(
            "Which server?",
            what=f"{len(running)} servers are running:\n{others}",
            fix="Use --port to choose the server to stop.",
        )
    server = next((each for each in running if port in (None, each.port)), None)
    if server is None:
        where = "" if port is None else f" on port {port}"
        raise UsageError(
            "No such server",
            what=f"None of your servers is running{where}.",
            fix=f"Running:\n{others}" if others else "`qlora-tui serve` starts one.",
        )
    stop_server(server)
    return CommandResult(msgspec.to_builtins(server), f"The server on port {server.port} has ended.")


def _arguments_of(args: argparse.Namespace) -> list[str]:
    """Return the arguments for a background process that serves the same runs, without the key."""
    options = {
        "--host": args.listen_on,
        "--port": args.port,
        "--idle-unload": args.idle_unload,
        "--gpu": args.gpu,
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    aliases = [f"--alias={alias}={name}" for alias, name in args.alias]
    return [*(find_run(name).id for name in args.runs), *given, *aliases, *(["--all"] if args.all else [])]


def _commands_of_others(run: RunDir) -> CommandResult:
    """Return commands that serve a run's exports with vLLM and llama.cpp.

    If an export is missing, the command that creates it comes first. The options follow llama.cpp's
    common/arg.cpp (build b11434), and vLLM's vllm/engine/arg_utils.py and
    vllm/entrypoints/openai/cli_args.py (commit 005223338608).
    """
    # The newest file of each form that still exists.
    exported = {
        each.request.form: each.status.paths[0]
        for each in reversed(read_exports(run))
        if each.request.checkpoint is None and each.status.paths and Path(each.status.paths[0]).exists()
    }
    name = shlex.quote(run.id)
    where = "--host 127.0.0.1 --port 8000"
    folder, file = exported.get("merge"), exported.get("gguf")
    commands = [
        *([] if folder else [f"qlora-tui export merge {name} MERGED"]),
        f"vllm serve {shlex.quote(folder or 'MERGED')} --served-model-name {name} {where}",
        *([] if file else [f"qlora-tui export gguf {name} MODEL.gguf --quant Q4_K_M"]),
        f"llama-server -m {shlex.quote(file or 'MODEL.gguf')} --alias {name} {where}",
    ]
    return CommandResult({"commands": commands}, "\n".join(commands))


def _alias(text: str) -> tuple[str, str]:
    alias, _, name = text.partition("=")
    if not alias or not name:
        raise argparse.ArgumentTypeError("must be NAME=MODEL, as in gpt-4o-mini=my-run")
    return alias, name


def _port(text: str) -> int:
    port = whole_number(text)
    if port > 65_535:
        raise argparse.ArgumentTypeError("must be at most 65535")
    return port


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="runs of one base model: ids, names, beginnings of one, or `last`; without RUN, all runs of "
        "the newest run's base model, including later runs",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="in addition to RUN, serve every run of its base model, including later runs",
    )
    parser.add_argument("--port", type=_port, help=f"port to listen on (default: {_PORT})")
    # The ``dest`` is not `host`, which is the option of the main command for another machine.
    parser.add_argument(
        "--host",
        dest="listen_on",
        metavar="HOST",
        default="127.0.0.1",
        help="address to listen on (default: this machine only)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send; safer in {KEY_VARIABLE}, because other users can see arguments; "
        "by default, one is generated if other machines can reach the server",
    )
    parser.add_argument(
        "--alias",
        type=_alias,
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another name for a model, for programs that expect a certain name; repeatable",
    )
    parser.add_argument(
        "--idle-unload",
        type=positive_float,
        metavar="MINUTES",
        help="unload the model after this many minutes without a request; the next request loads it again",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--background", action="store_true", help="serve in a background process that outlives the terminal"
    )
    action.add_argument(
        "--stop", action="store_true", help="stop the server; if several are running, the server on --port"
    )
    action.add_argument(
        "--print-commands",
        action="store_true",
        help="print the commands that serve the run with vLLM and llama.cpp",
    )


SUBCOMMANDS = {"serve": Subcommand(run, _arguments, uses_gpu=True)}
