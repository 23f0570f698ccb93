"""``export``: a run's result in a format that other programs load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msgspec.structs import replace

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.runs.directory import find_run


def run(args: argparse.Namespace) -> CommandResult:
    """Merge the adapter into the 16-bit base and write the model to a folder."""
    from qlora_tui.chat.chat_sources import choose_adapter, run_source
    from qlora_tui.gpu.torch_env import configure_torch_env

    source = run_source(find_run(args.run_id))
    adapter_name = choose_adapter(source, checkpoint=args.checkpoint)
    configure_torch_env()
    from qlora_tui.export.merge import merge
    from qlora_tui.export.merge_check import verify_merge

    def on_status(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    merged = merge(source, adapter_name, args.out, on_status)
    check = verify_merge(source, adapter_name, Path(merged.folder), on_status)
    if isinstance(check, str):
        merged = replace(merged, unchecked_because=check)
    elif check.agrees:
        merged = replace(merged, check=check)
    else:
        raise UserError(
            "The merged model does not answer like the adapter",
            what=f"{merged.folder} is written, and {check.sentence}.",
            why="The base stores its weights in an unknown layout, or its files are damaged.",
            fix="Use the adapter instead, and report the model.",
        )
    summary = (
        f"{merged.folder}: {format_bytes(merged.bytes)}, {merged.changed_weights} weights changed "
        f"by the {adapter_name}."
    )
    check_line = f"Not checked: {check}." if isinstance(check, str) else f"Checked: {check.sentence}."
    return CommandResult(merged, f"{summary}\n{check_line}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("form", choices=("merge",), help="merge: adapter and base as one 16-bit model")
    parser.add_argument("run_id", metavar="RUN", help="a run's id or name, the beginning of one, or `last`")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist yet")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="a checkpoint, not the final adapter")


SUBCOMMANDS = {"export": Subcommand(run, _arguments)}
