"""``cache``: what can be made again, with its size, and deleting it."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_tui import paths
from qlora_tui.cli.subcommand import CommandResult, Subcommand, format_table
from qlora_tui.drafts import discard
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes

KINDS = {
    "quantized": "4-bit base weights, read by later runs and chats instead of quantizing again",
    "models": "16-bit weights converted from GGUF files; runs on these files need them again",
    "tokenized": "data as token ids",
    "datasets": "facts about Hub datasets",
    "base-answers": "answers of base models to general prompts, which evaluations compare with",
    "task-answers": "answers of bases and adapters to validation prompts, read by later evaluations",
    "configs": "config.json of Hub models, for estimates",
    "findings": "checks of data files",
    "uploads": "exports that are not on the Hub yet; without them an interrupted upload starts over",
}
"""Folders of the cache, and what is in them."""
_NAMES = {
    "quantized": r".+-[0-9a-f]{16}",
    "models": r".+-[0-9a-f]{12}|SmolLM2-135M-Instruct",
    "tokenized": r"[0-9a-f]{32}",
    "datasets": r".+\.json",
    "base-answers": r".+-[0-9a-f]{16}\.safetensors",
    "task-answers": r".+-[0-9a-f]{16}\.jsonl",
    "configs": r".+\.json",
    "findings": r"[0-9a-f]{32}\.json",
    "uploads": r"[0-9a-f]{16}",
}
"""Names that this program gives to what it puts there. Anything else is neither listed nor deleted."""


@dataclass(frozen=True)
class CachedItem:
    """One file or folder of the cache."""

    kind: str
    path: Path
    size_bytes: int
    used_at: float
    """Unix time when it was last used, or written."""


def run(args: argparse.Namespace) -> CommandResult:
    """List the cache; with ``--clear`` delete one kind. Raises UserError where it cannot be deleted."""
    items = list_items()
    if args.clear is not None:
        items = [item for item in items if item.kind == args.clear]
        _delete(items)
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
        return CommandResult(data, f"Deleted {format_bytes(total)} of {args.clear}: {KINDS[args.clear]}.")
    return CommandResult(data, _table(items, total))


def list_items() -> list[CachedItem]:
    """Everything in the cache, by kind, the largest first."""
    items = []
    for kind in KINDS:
        folder = paths.cache_dir() / kind
        entries = folder.iterdir() if folder.is_dir() else ()
        entries_of_kind = [
            _item(kind, path)
            for path in entries
            if re.fullmatch(_NAMES[kind], path.name) and not path.is_symlink()
        ]
        items += sorted(entries_of_kind, key=lambda item: -item.size_bytes)
    return items


def _item(kind: str, path: Path) -> CachedItem:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return CachedItem(kind, path, sum(file.stat().st_size for file in files), path.stat().st_mtime)


def _delete(items: list[CachedItem]) -> None:
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


def _table(items: list[CachedItem], total: int) -> str:
    if not items:
        return f"The cache is empty: {paths.cache_dir()}"
    rows = [
        [item.kind, item.path.name, format_bytes(item.size_bytes), _age(time.time() - item.used_at)]
        for item in items
    ]
    kinds = dict.fromkeys(item.kind for item in items)
    explained = [f"{kind}: {KINDS[kind]}. Delete with `qlora-tui cache --clear {kind}`." for kind in kinds]
    lines = [format_table(rows, ["kind", "name", "size", "used"]), "", f"{format_bytes(total)} in all", ""]
    return "\n".join([*lines, *explained])


def _age(seconds: float) -> str:
    hours = seconds / 3600
    return "today" if hours < 24 else f"{hours / 24:.0f} days ago"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", choices=list(KINDS), help="delete everything of this kind")


SUBCOMMANDS = {"cache": Subcommand(run, _arguments)}
