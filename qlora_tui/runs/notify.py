"""Telling the user that a run is over, wherever they are: a webhook and a command of their own.

``python -m qlora_tui.runs.notify RUN_DIR`` is a process by itself, which the runner starts and does not wait
for: nothing here can hold up the queue or harm a run. What fails is said on stderr, which is the runner's
log; the webhook's address, often a secret, is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from qlora_tui.errors import Problem
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.news import News, news_of
from qlora_tui.settings import load_settings

WEBHOOK_S = 5.0
COMMAND_S = 30.0


def main(folder: str) -> int:
    """Tell of one run what there is to tell."""
    try:
        wanted = load_settings().notify
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    if not (wanted.webhook or wanted.command):
        return 0
    run = RunDir(Path(folder))
    news = news_of(run)
    if news is None:
        return 0
    # The command first: it does not depend on a network.
    for trouble in (_command(wanted.command, news), _webhook(wanted.webhook, news)):
        if trouble:
            print(f"{run.id}: {trouble}", file=sys.stderr)
    return 0


def _webhook(url: str, news: News) -> str:
    """Post the news; what went wrong, or nothing."""
    if not url:
        return ""
    request = urllib.request.Request(
        url,
        data=msgspec.json.encode(news),
        headers={"Content-Type": "application/json", "User-Agent": "qlora-tui"},
    )
    host = urlsplit(url).hostname
    try:
        with urllib.request.urlopen(request, timeout=WEBHOOK_S):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"the webhook at {host} answered {error.code}"
    except (OSError, HTTPException) as error:
        why = getattr(error, "reason", None) or type(error).__name__
        return f"the webhook at {host} could not be reached: {why}"


def _command(command: str, news: News) -> str:
    """Run the user's command with the news in its environment; what went wrong, or nothing."""
    if not command:
        return ""
    told = {f"QLORA_TUI_{key.upper()}": getattr(news, key) for key in ("event", "run", "name", "text")}
    try:
        done = subprocess.run(
            command,
            shell=True,
            env=os.environ | told,
            stdin=subprocess.DEVNULL,
            timeout=COMMAND_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"notify.command did not end within {COMMAND_S:.0f} s"
    return f"notify.command exited with code {done.returncode}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
