"""``locate``: print where files are."""

from __future__ import annotations

import argparse

from qlora_tui import paths
from qlora_tui.cli.subcommand import CommandResult, Subcommand


def run(args: argparse.Namespace) -> CommandResult:
    """Return every directory the program uses."""
    places = {
        "config": paths.config_dir(),
        "presets": paths.user_presets_dir(),
        "themes": paths.user_themes_dir(),
        "shipped_presets": paths.shipped_dir("presets"),
        "shipped_themes": paths.shipped_dir("themes"),
        "state": paths.state_dir(),
        "runs": paths.runs_dir(),
        "cache": paths.cache_dir(),
    }
    width = max(map(len, places))
    return CommandResult(
        data={name: str(path) for name, path in places.items()},
        text="\n".join(f"{name.replace('_', ' '):<{width}}  {path}" for name, path in places.items()),
    )


SUBCOMMANDS = {"locate": Subcommand(run)}
