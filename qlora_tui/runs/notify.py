"""Notifying the user that a run has ended, by webhook and by the user's own command.

``python -m qlora_tui.runs.notify RUN_DIR`` is a separate process, which the runner starts and does not wait
for: nothing here can delay the queue or harm a run. Failures go to stderr, which is the runner's log; the
webhook's address, often a secret, does not.
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
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from qlora_tui import subprocesses
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.notification import RunNotification, notification_for
from qlora_tui.settings import load_settings

WEBHOOK_S = 5.0
COMMAND_S = 30.0


def main(folder: str) -> int:
    """Send the notifications about one run; return the exit code."""
    try:
        wanted = load_settings().notify
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 1
    if not (wanted.webhook or wanted.command):
        return 0
    run = RunDir(Path(folder))
    news = notification_for(run)
    if news is None:
        return 0
    # The command goes first: it does not depend on a network.
    for failure in (_command(wanted.command, news), _webhook(wanted.webhook, news)):
        if failure:
            print(f"{run.id}: {failure}", file=sys.stderr)
    return 0


def _webhook(url: str, notification: RunNotification) -> str:
    """Post the notification; return an error message, if any."""
    if not url:
        return ""
    try:
        host, url = _ascii_address(url)
    except ValueError:
        return "notify.webhook in config.toml is not an address: its host or its port is not valid"
    answers: list[str] = []
    # In a thread: the library's timeout applies to each read, and DNS lookup can take longer.
    thread = threading.Thread(target=lambda: answers.append(_post(url, notification)), daemon=True)
    thread.start()
    thread.join(WEBHOOK_S)
    failure = answers[0] if answers else f"did not answer within {WEBHOOK_S:.0f} s"
    return f"the webhook at {host} {failure}" if failure else ""


def _ascii_address(url: str) -> tuple[str, str]:
    """Return the host and the URL in ASCII: the host by IDNA, the rest percent-encoded. Raises ValueError."""
    parts = urlsplit(url)
    host = parts.hostname
    # Reading ``port`` raises if it is not a number.
    if not host or parts.port == 0:
        raise ValueError("no host or no port")
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="%/:?@!$&'()*+,;=~") for part in (parts.path, parts.query))
    return host, urlunsplit((parts.scheme, netloc, path, query, ""))


def _post(url: str, notification: RunNotification) -> str:
    """Send the request; return an error message, if any."""
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
            env=subprocesses.user_env() | variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return f"notify.command could not be started: {error.strerror}"
    try:
        code = started.wait(COMMAND_S)
    except subprocess.TimeoutExpired:
        # Kill the whole process group: a pipeline outlives the shell that started it.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        return f"notify.command did not end within {COMMAND_S:.0f} s"
    return f"notify.command exited with code {code}" if code else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
