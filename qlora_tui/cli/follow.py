"""A run told line by line: what ``train`` and ``attach`` print, for people, screen readers and programs."""

from __future__ import annotations

import sys
import time

from qlora_tui.cli.verb import print_json
from qlora_tui.errors import FAILED
from qlora_tui.runs.describe import describe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import AnyEvent, Failed
from qlora_tui.runs.following import followed
from qlora_tui.runs.view import RunView


def follow(run: RunDir, *, as_json: bool) -> int:
    """Print every event from the first to the run's end. 1 when it failed; Ctrl-C detaches with 0."""
    view = RunView(run)
    try:
        for event in followed(view):
            _tell(event, view, as_json=as_json)
    except KeyboardInterrupt:
        print(f"\nDetached: {run.id} goes on. `qlora-tui attach {run.id}` comes back.", file=sys.stderr)
        return 0
    if view.ending is None:
        print(f"{run.id} is {view.status.state}: {view.status.detail}", file=sys.stderr)
        print(f"`qlora-tui resume {run.id}` goes on from its last checkpoint.", file=sys.stderr)
        return FAILED
    return FAILED if isinstance(view.ending, Failed) else 0


def _tell(event: AnyEvent, view: RunView, *, as_json: bool) -> None:
    if as_json:
        print_json(event)
        return
    line = describe(event, view.total_steps)
    if line:
        print(f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {line}", flush=True)
