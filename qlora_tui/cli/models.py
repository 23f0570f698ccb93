"""``models`` lists models, ``download`` downloads one from the Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.catalog.download import download
from qlora_tui.catalog.hub import HubModel, search_models
from qlora_tui.catalog.local_models import LocalModel, list_local_models
from qlora_tui.cli.subcommand import CommandResult, ProgressLine, Subcommand, format_table
from qlora_tui.formatting import format_bytes, format_count
from qlora_tui.settings import load_settings


def run_models(args: argparse.Namespace) -> CommandResult:
    """List local models, and with a query also models on the Hub."""
    folders = [Path(folder).expanduser() for folder in load_settings().model_folders]
    query = (args.query or "").lower()
    local = [model for model in list_local_models(folders) if query in model.name.lower()]
    text = _local_table(local) if local else "No models on this machine" + (" match." if query else " yet.")
    data: dict[str, Any] = {"local": [_local_entry(model) for model in local]}
    if args.query:
        hub_models = search_models(args.query)
        data["hub"] = [
            {**msgspec.structs.asdict(model), "refusal": str(model.refusal) if model.refusal else None}
            for model in hub_models
        ]
        text += "\n\n" + (_hub_table(hub_models) if hub_models else "No match on the Hub.")
    return CommandResult(data=data, text=text)


def _local_table(models: list[LocalModel]) -> str:
    rows = [
        [
            model.name,
            format_count(model.architecture.total_params) if model.architecture else "NA",
            format_bytes(model.size_bytes),
            model.source,
            model.refusal.what if model.refusal else "",
        ]
        for model in models
    ]
    return format_table(rows, ["model", "parameters", "size", "from", ""])


def _local_entry(model: LocalModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "path": str(model.path),
        "source": model.source,
        "size_bytes": model.size_bytes,
        "parameters": model.architecture.total_params if model.architecture else None,
        "refusal": str(model.refusal) if model.refusal else None,
    }


def _hub_table(models: list[HubModel]) -> str:
    rows = [
        [
            model.id,
            format_count(model.parameters),
            f"{model.downloads:,}" if model.downloads else "",
            "license not accepted yet" if model.gated else "",
        ]
        for model in models
    ]
    return format_table(rows, ["on the Hub", "parameters", "downloads", ""])


def run_download(args: argparse.Namespace) -> CommandResult:
    """Download the missing files of the model. Raises UserError; files that were downloaded are kept."""
    total_bytes = 0
    resume_command = f"qlora-tui download {args.model}"
    if args.revision != "main":
        resume_command += f" --revision {args.revision}"

    with ProgressLine() as line:

        def report(done: int, total: int, text: str = "") -> None:
            nonlocal total_bytes
            total_bytes = total
            so_far = f"{format_bytes(done)} of {format_bytes(total)}  {text}".rstrip()
            line.show(so_far, is_due=done == total)

        try:
            path = download(args.model, report, revision=args.revision)
        except KeyboardInterrupt:
            line.clear()
            print(f"The partial download is kept. Resume it with `{resume_command}`.", file=sys.stderr)
            raise
    # A name without a revision means the main revision.
    name = args.model if args.revision == "main" else str(path)
    return CommandResult(
        data={
            "model": args.model,
            "revision": args.revision,
            "commit": path.name,
            "path": str(path),
            "total_bytes": total_bytes,
        },
        text=f"{args.model} is in {path} ({format_bytes(total_bytes)})\n"
        f"`qlora-tui estimate --model {name}` says whether training it fits in memory.",
    )


def _download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Hub id: publisher/name")
    parser.add_argument("--revision", default="main", help="a branch, tag or commit (default: main)")


SUBCOMMANDS = {
    "models": Subcommand(
        run_models,
        lambda parser: parser.add_argument(
            "query", nargs="?", help="search terms, for this machine and the Hub"
        ),
        changes=(),
    ),
    "download": Subcommand(run_download, _download_arguments),
}
