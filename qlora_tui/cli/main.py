"""``qlora-tui``: parses arguments, opens the app or runs a command, and prints errors as sentences."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from qlora_tui import __version__, paths
from qlora_tui.cli.subcommand import (
    GPU_HELP,
    HOST_HELP,
    add_gpu_gib_argument,
    open_missing_streams,
    print_result,
    visible_output,
)
from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, INTERNAL_ERROR, UserError, disk_problem
from qlora_tui.settings import load_settings

if TYPE_CHECKING:
    from qlora_tui.cli.subcommand import Subcommand
    from qlora_tui.runs.directory import RunDir

SUBCOMMANDS = {
    "models": ("models", "List models on this machine; with a query, also on the Hub."),
    "download": ("models", "Download a model from the Hub, resuming a partial download."),
    "estimate": ("estimate", "Predict a recipe's memory, item by item."),
    "data": (
        "data",
        "Inspect a data file, show one row as the model sees it, or find the rows that hurt a run.",
    ),
    "presets": ("presets", "List presets, show one, or print every setting."),
    "import": (
        "import_recipe",
        "Read a recipe written for axolotl, LLaMA-Factory, TRL, Unsloth or peft.",
    ),
    "suggest": ("suggest", "Suggest length, rank, epochs, batch and learning rate, each with its reason."),
    "train": ("train", "Queue a training run and follow it."),
    "sweep": (
        "sweep",
        "Train variations of a recipe, and test whether the best leads by more than chance.",
    ),
    "runs": ("runs", "List every run and the queue; rename, save, delete or check them."),
    "attach": ("runs", "Watch a run in the app; with --log or in a pipe, print its events."),
    "stop": ("runs", "Stop a run after saving a checkpoint and the adapter."),
    "pause": ("runs", "Pause a run: save a checkpoint and free the GPU; `resume` continues it."),
    "resume": ("runs", "Resume a stopped, paused, failed or lost run from its last checkpoint."),
    "ask": ("runs", "Send a request to a running trainer (checkpoint, evaluate, …)."),
    "evaluate": ("chat", "Compare how a run's adapter and its base answer validation prompts."),
    "predict": ("predict", "Predict the label of each row of a file, with its probability."),
    "chat": ("chat", "Chat with a run's adapter, or with the base model."),
    "serve": ("serve", "Serve runs and their base to other programs, as an OpenAI-compatible HTTP server."),
    "mcp": ("mcp_server", "Offer these commands as tools to AI assistants (Model Context Protocol)."),
    "export": ("export", "Export a run's model or adapter for other programs, or upload it to the Hub."),
    "store": (
        "store",
        "Answer an app that runs on another machine, over stdin and stdout; `qlora-tui --host` starts this "
        "command.",
    ),
    "doctor": ("installation", "Check that this machine can train, and suggest fixes."),
    "demo": ("demo", "Download a small model (89 MiB), fine-tune it, and compare it with its base."),
    "cache": ("installation", "List the caches with their sizes; --clear deletes one."),
    "locate": ("installation", "Print where presets, runs and caches are stored."),
    "completion": ("installation", "Print a script that completes commands in bash, zsh or fish."),
}
"""Module of ``qlora_tui.cli`` and help text of each command. The module is loaded when the command is
called, so that the app and fast commands do not wait for other imports."""
_INTERRUPTED = 130
_ACTIONS: dict[str, tuple[str, ...]] = {"presets": ("show", "reference")}
"""Commands with a default action, and their actions, the default first.

For example, `presets paper` means `presets show paper`.
"""


def can_show_app() -> bool:
    """Return whether stdin and stdout are a terminal with cursor control."""
    return _is_terminal() and os.environ.get("TERM") not in (None, "", "dumb")


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def open_app(
    *, gpu_gib: float | None = None, mouse: bool = True, run: RunDir | None = None, host: str | None = None
) -> int:
    """Open the app, and end this process with the app's exit code once the app is closed.

    Args:
        gpu_gib: Memory of an assumed GPU to estimate for, in GiB; None for this machine's GPU.
        mouse: Whether the app uses the mouse; False leaves it to the terminal.
        run: The run to watch; None shows Home.
        host: The box to work on, by its ssh name; None for this machine.

    Raises:
        UserError: There is no terminal that can show the app, the box cannot be reached, or the app
            ended because the disk could not be written.
    """
    # The app enables it again with its first frame. Until then, there is no garbage worth collecting.
    gc.disable()
    if not can_show_app():
        term = os.environ.get("TERM", "")
        raise UserError(
            "No terminal",
            what=f"This terminal cannot show the app: TERM is {term or 'empty'}."
            if _is_terminal()
            else "The app needs a terminal, but its input or output is not one.",
            fix="Use a command: `qlora-tui --help` lists them."
            + (" Or set TERM, to xterm-256color for example." if _is_terminal() else ""),
            exit_code=2,
        )
    settings = load_settings()
    if host is not None:
        from qlora_tui.remote.link import work_on
        from qlora_tui.remote.ssh import Box

        # Connect before the app takes over the terminal, because ssh may ask for a password.
        print(f"Connecting to {host}…", file=sys.stderr)
        work_on(Box(host))
    import msgspec

    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.line_filters import has_no_colors
    from qlora_tui.tui.process import capture_stderr

    if gpu_gib:
        settings = msgspec.structs.replace(settings, gpu_memory_gib=gpu_gib)
    log = paths.log_path()
    with capture_stderr(log):
        app = QloraApp(settings, watched_run=run)
        app.no_color = app.no_color or has_no_colors()
        app.run(mouse=settings.mouse and mouse)
    # Print these now that the shell's screen is restored and stderr is no longer the log.
    for line in app.farewell:
        print(line)
    if app.disk_faults.ended_by is not None:
        raise app.disk_faults.ended_by
    if app.return_code == EXIT_FAILURE:
        print(f"qlora-tui: The app crashed.\n  Details: {log}", file=sys.stderr)
    end_process(app.return_code or 0)


_THREADS_TIMEOUT_S = 1.0


def end_process(exit_code: int) -> NoReturn:
    """End this process without Python's clean-up, once its threads have ended or after a second.

    Most threads read from a network or a disk that may hang, and their results are not needed anymore.
    """
    deadline = time.monotonic() + _THREADS_TIMEOUT_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Open the app or run one command, and return the exit code.

    It is 0 for success, 1 for a failure, 2 for an invalid call, and 130 after Ctrl-C.
    """
    open_missing_streams()
    with visible_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    try:
        if "_ARGCOMPLETE" in os.environ:
            _complete()
        if not argv:
            return open_app()
        _check_command(argv)
        verb = next((word for word in argv if word in SUBCOMMANDS), None)
        parser = command_parser(verb)
        args = parser.parse_args(_with_action(argv, verb))
        if args.host is not None and args.verb is not None:
            from qlora_tui.cli.on_box import run_on_box
            from qlora_tui.remote.ssh import Box

            return run_on_box(Box(args.host), _without_host(argv), args, parser)
        if args.gpu:
            from qlora_tui.settings import GPU_VARIABLE

            os.environ[GPU_VARIABLE] = args.gpu
        if args.verb is None and args.host is not None and args.gpu:
            raise UserError(
                "--gpu cannot be used for the app with --host",
                what="--gpu applies to commands. With --host, the app uses the GPU that is set on the other "
                "machine.",
                fix="Set gpu in config.toml on that machine, or use "
                "`qlora-tui --host BOX --gpu GPU train …`.",
                exit_code=EXIT_USAGE,
            )
        if args.verb is None:
            return open_app(gpu_gib=args.gpu_gib, mouse=not args.no_mouse, host=args.host)
        result = args.run(args)
        return result if isinstance(result, int) else print_result(result, as_json=args.json)
    except UserError as problem:
        print(f"qlora-tui: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader, such as head or less, has closed the pipe, which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except UnicodeEncodeError as error:
        odd = next((word for word in argv if not _is_utf8(word)), None)
        if odd is None:
            return _report_bug(error)
        print(f"qlora-tui: An argument is not UTF-8: {odd}", file=sys.stderr)
        print("  It cannot be stored or sent that way. Rename the file, or type it again.", file=sys.stderr)
        return EXIT_USAGE
    except Exception as error:
        unwritable = disk_problem(error) if isinstance(error, OSError) else None
        if unwritable is None:
            return _report_bug(error)
        print(f"qlora-tui: {unwritable}", file=sys.stderr)
        return unwritable.exit_code


def _is_utf8(word: str) -> bool:
    """Return whether a word is valid UTF-8. Bytes that are not UTF-8 have become surrogates."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_host(argv: list[str]) -> list[str]:
    """Return the arguments without ``--host BOX``, which precedes the command."""
    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--host")
    return [*argv[:at], *argv[at + (1 if "=" in argv[at] else 2) :]]


def _with_action(argv: list[str], verb: str | None) -> list[str]:
    """Insert the default action if a command is followed by a name instead of an action."""
    actions = _ACTIONS.get(verb or "", ())
    start = argv.index(verb) + 1 if actions and verb else len(argv)
    place = next((i for i in range(start, len(argv)) if not argv[i].startswith("-")), None)
    if place is None or argv[place] in actions:
        return argv
    return [*argv[:place], actions[0], *argv[place:]]


def _check_command(argv: Sequence[str]) -> None:
    """Raise UserError for an unknown command. The error suggests the most similar command."""
    words = iter(argv)
    for word in words:
        if word in ("--gpu", "--gpu-gib", "--host"):
            next(words, None)
        elif not word.startswith("-"):
            if word in SUBCOMMANDS:
                return
            from qlora_tui.recipe.aliases import closest

            match = closest(word, SUBCOMMANDS)
            meant = f"Did you mean `qlora-tui {match}`? " if match else ""
            raise UserError(
                "Unknown command",
                what=f"{word!r} is not a command.",
                fix=f"{meant}`qlora-tui --help` lists all commands.",
                exit_code=EXIT_USAGE,
            )


def subcommand(name: str) -> Subcommand:
    """Load the implementation of a command."""
    command: Subcommand = import_module(f"qlora_tui.cli.{SUBCOMMANDS[name][0]}").SUBCOMMANDS[name]
    return command


def command_parser(name_called: str | None) -> argparse.ArgumentParser:
    """Return the parser of all commands. Only the called command has its arguments."""
    parser = argparse.ArgumentParser(
        prog="qlora-tui",
        description="Fine-tune language models with QLoRA on one GPU. Without a command, the app opens.",
    )
    parser.add_argument("--version", action="version", version=f"qlora-tui {__version__}")
    add_gpu_gib_argument(parser)
    parser.add_argument("--gpu", metavar="GPU", help=GPU_HELP)
    parser.add_argument("--host", metavar="BOX", help=HOST_HELP)
    parser.add_argument("--no-mouse", action="store_true", help="leave the mouse to the terminal")
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    for name, (_, help_) in SUBCOMMANDS.items():
        sub = verbs.add_parser(name, help=help_, description=help_)
        if name == name_called:
            from qlora_tui.cli.subcommand import JSON_HELP, add_gpu_argument

            sub.add_argument("--json", action="store_true", help=JSON_HELP)
            verb = subcommand(name)
            verb.arguments(sub)
            if verb.uses_gpu:
                add_gpu_argument(sub)
            sub.set_defaults(run=verb.run)
    return parser


def _complete() -> NoReturn:
    """Answer a shell's completion request; see :mod:`qlora_tui.cli.installation`."""
    from qlora_tui.cli.installation import answer

    words = os.environ.get("COMP_LINE", "").split()
    answer(command_parser(next((word for word in words if word in SUBCOMMANDS), None)))


def _report_bug(error: Exception) -> int:
    from qlora_tui.gpu.cuda_errors import cuda_problem

    if (problem := cuda_problem(error)) is not None:
        print(f"qlora-tui: {problem}", file=sys.stderr)
        return problem.exit_code
    print(f"qlora-tui: {INTERNAL_ERROR}: {type(error).__name__}: {error}", file=sys.stderr)
    try:
        log = paths.log_path()
        with log.open("a") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S\n"))
            traceback.print_exception(error, file=file)
    except OSError as unwritable:
        print(f"  The log could not be written ({unwritable}), so here is the traceback:", file=sys.stderr)
        traceback.print_exception(error)
        return EXIT_FAILURE
    print(f"  This is a bug in qlora-tui. Details: {log}", file=sys.stderr)
    return EXIT_FAILURE
