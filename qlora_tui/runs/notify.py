"""Notifies the user that a run has finished or failed, by webhook and by the user's own command.

The runner starts a notification as a job and does not wait for it, so it cannot delay the queue or harm a
run. Errors in sending go to stderr, which is the runner's log. They do not contain the webhook's address,
which is often a secret. Stops and pauses, which the user requested, are not reported, and neither are
failures of runs that the runner retries.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec
from msgspec import Struct

from qlora_tui import worker
from qlora_tui.formatting import format_loss
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.events import Failed, Finished
from qlora_tui.runs.memory_retry import next_plan
from qlora_tui.runs.view import RunView
from qlora_tui.settings import load_settings

WEBHOOK_S = 5.0
COMMAND_S = 30.0
_STEPS = 64


def notify(folder: Path) -> None:
    """Send the notifications about the run in a folder. Raises UserError."""
    wanted = load_settings().notify
    if not (wanted.webhook or wanted.command):
        return
    if (news := notification_for(RunDir(folder))) is not None:
        send(news)


def send(news: RunNotification) -> None:
    """Send a notification through each channel in the settings. Raises UserError."""
    wanted = load_settings().notify
    # The command runs first, because it does not depend on the network.
    for failure in (_command(wanted.command, news), _webhook(wanted.webhook, news)):
        if failure:
            print(f"{news.run}: {failure}", file=sys.stderr)


class RunNotification(Struct, frozen=True, kw_only=True):
    """Body of the webhook's request, without paths, addresses or content of the data."""

    event: Literal["finished", "failed"]
    run: str
    """Id of the run or sweep."""
    name: str
    text: str
    """The message in one sentence: ``tickets is finished: best validation loss 1.21 at step 640.``"""
    step: int
    total_steps: int
    best_loss: float | None
    """Lowest validation loss; None if none was measured."""


def notification_for(run: RunDir) -> RunNotification | None:
    """Return the notification about a run. Return None if there is nothing to report, or if the run belongs
    to a sweep.
    """
    if run.sweep:
        return None
    ending = last_event(run.events_path)
    if not isinstance(ending, Finished | Failed) or next_plan(run, ending) is not None:
        return None
    view, _ = RunView.from_sample(run, _STEPS)
    best = view.best
    if isinstance(ending, Failed):
        text = f"{run.name} failed: {ending.title}."
    else:
        reached = f": best validation loss {format_loss(best.loss)} at step {best.step:,}" if best else ""
        if view.loss_to_beat is not None:
            reached += f", worse than before training ({format_loss(view.loss_to_beat)})"
        text = f"{run.name} is finished{reached}."
    return RunNotification(
        event="finished" if isinstance(ending, Finished) else "failed",
        run=run.id,
        name=run.name,
        text=text,
        step=view.step,
        total_steps=view.total_steps,
        best_loss=None if best is None else best.loss,
    )


def _webhook(url: str, notification: RunNotification) -> str:
    """Post the notification; return an error message, or an empty text."""
    if not url:
        return ""
    try:
        host, url = _ascii_address(url)
    except ValueError:
        return "notify.webhook in config.toml is not an address: its host or its port is not valid"
    answers: list[str] = []
    # Use a thread, because the library's timeout applies to each read, and DNS lookup can take longer.
    thread = threading.Thread(target=lambda: answers.append(_post(url, notification)), daemon=True)
    thread.start()
    thread.join(WEBHOOK_S)
    failure = answers[0] if answers else f"did not answer within {WEBHOOK_S:.0f} s"
    return f"the webhook at {host} {failure}" if failure else ""


def _ascii_address(url: str) -> tuple[str, str]:
    """Return host and URL in ASCII: the host by IDNA, the rest percent-encoded. Raises ValueError."""
    parts = urlsplit(url)
    host = parts.hostname
    # Reading ``port`` raises an error if it is not a number.
    if not host or parts.port == 0:
        raise ValueError("no host or no port")
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="%/:?@!$&'()*+,;=~") for part in (parts.path, parts.query))
    return host, urlunsplit((parts.scheme, netloc, path, query, ""))


def _post(url: str, notification: RunNotification) -> str:
    """Send the request; return an error message, or an empty text."""
    request = urllib.request.Request(
        url,
        data=msgspec.json.encode(notification),
        headers={"Content-Type": "application/json", "User-Agent": "qlora-tui"},
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=WEBHOOK_S):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        return f"could not be reached: {getattr(error, 'reason', None) or type(error).__name__}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a redirected POST would become a GET without its body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _command(command: str, notification: RunNotification) -> str:
    """Run the user's command with the message in its environment; return an error message, if any."""
    if not command:
        return ""
    variables = {
        f"QLORA_TUI_{key.upper()}": getattr(notification, key) for key in ("event", "run", "name", "text")
    }
    try:
        started = subprocess.Popen(
            command,
            shell=True,
            env=worker.user_env() | variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"notify.command could not be started: {error.strerror}"
    try:
        code = started.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        # Kill the whole process group, because a pipeline outlives the shell that started it.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        return f"notify.command did not end within {COMMAND_S:.0f} s"
    return f"notify.command exited with code {code}" if code else ""
