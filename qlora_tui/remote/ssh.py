"""The user's own ssh: finds the program on the box, compares versions, and opens channels.

ssh itself handles names, keys, agent, jump hosts and prompts. All channels share one connection
(``ControlMaster``), so only the first channel may ask for a password.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

from qlora_tui import __version__
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.process_end import how_ended
from qlora_tui.remote.calls import UNREACHABLE

_MARK = "@qlora-tui-here"
"""Prefix of the line after which the program's output begins. Shell profiles may print text before it."""
_SSH_FAILED = 255
"""Exit code with which ssh itself fails."""
_KEEP_S = 600
"""Seconds for which the shared connection stays open after the last channel."""
_LAST_LINES = 3
_LONGEST_TEXT_BYTES = 1 << 16
_END_S = 20.0
"""Maximum seconds to wait for the last messages and the exit of a program whose input was closed."""
_LONGEST_SOCKET = 60
"""Maximum length of the sockets folder's path. ssh appends a name of 58 characters, and the limit is 108."""
_SCRIPT = (
    "for c in qlora-tui ~/.local/bin/qlora-tui ~/bin/qlora-tui; do"
    ' p=$(command -v "$c") && break; done;'
    # Only the last line is used, because a profile may print text before it.
    ' [ -n "$p" ] || p=$("${SHELL:-sh}" -lc "command -v qlora-tui" 2>/dev/null </dev/null | tail -n 1);'
    ' [ -x "$p" ] || { echo; echo "@mark"; exit 127; };'
    ' v=$("$p" --version </dev/null);'
    ' echo; echo "@mark $v $p"; [ "$v" = "$0" ] || exit 127; exec "$p" "$@"'
).replace("@mark", _MARK)
"""Shell script that finds the program in the PATH, in the folders where uv and pipx install programs, or in
the PATH of a login shell. It prints the program's version and path, and executes the program if the version
is ``$0``."""


@dataclass(frozen=True)
class Box:
    """A machine that is reachable by ssh."""

    name: str
    """Destination argument of ssh: ``user@box``, or a name in the user's configuration."""
    asks: bool = True
    """Whether ssh may ask for passwords and host keys at the terminal."""
    _program: list[str] = field(default_factory=list, compare=False)
    """Path of the program on the box, once known."""

    def __post_init__(self) -> None:
        """Raise UserError for an empty name, or a name that ssh would read as an option."""
        if not self.name.strip() or self.name.startswith("-"):
            raise UserError(
                "No host",
                what=f"{self.name!r} is not a valid host name.",
                fix="Use a name that `ssh` accepts: `qlora-tui --host user@box`.",
                exit_code=EXIT_USAGE,
            )

    @cached_property
    def ssh(self) -> str:
        """Path of ssh. Raises UserError."""
        path = shutil.which("ssh")
        if path is None:
            raise UserError(
                "ssh is not installed",
                what="The program `ssh`, which connects to another box, was not found on this machine.",
                fix="Install it: `sudo apt install openssh-client` (Debian, Ubuntu), or "
                "`sudo dnf install openssh-clients` (Fedora).",
            )
        return path

    def argv(self, command: Sequence[str], *, terminal: bool = False) -> list[str]:
        """Return the ssh command that runs a command on the box, quoted for its login shell."""
        # ssh joins its arguments with spaces and passes them to the login shell, so each one is quoted.
        return [
            *(self.ssh, "-t" if terminal else "-T", *_options()),
            *(() if self.asks else ("-o", "BatchMode=yes")),
            *("--", self.name, "exec " + shlex.join(command)),
        ]

    def program_argv(self, *arguments: str, terminal: bool = False) -> list[str]:
        """Return the command that runs this program on the box, after :meth:`open_program` has found it."""
        return self.argv([self._program[0], *arguments], terminal=terminal)

    def open_program(self, *arguments: str, stdin: int | None = subprocess.PIPE) -> Channel:
        """Start this program on the box, and return its channel once the program runs.

        Raises UserError if the box cannot be reached, or lacks the program or this version of it.
        """
        argv = self.argv(["sh", "-c", _SCRIPT, f"qlora-tui {__version__}", *arguments])
        process = subprocess.Popen(
            argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=not self.asks
        )
        channel = Channel(self, process)
        try:
            self._program[:] = [channel.wait_for_program()]
        except BaseException:
            channel.close()
            raise
        return channel

    def hang_up(self) -> None:
        """Close the shared connection, even if the network has dropped it."""
        subprocess.run(
            [self.ssh, *_options(), "-O", "exit", "--", self.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=10,
        )


class Channel:
    """A program that runs on the box, with its stdin and stdout."""

    def __init__(self, box: Box, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self.process = process
        self.output: IO[bytes] = process.stdout
        self._box = box
        self._errors: list[str] = []
        self._is_started = False
        self._reader = threading.Thread(target=self._read_errors, args=(process.stderr,), daemon=True)
        self._reader.start()

    def wait_for_program(self) -> str:
        """Return the path of the program once it runs. Raises UserError if it does not start."""
        while line := self.output.readline(_LONGEST_TEXT_BYTES):
            if line.startswith(_MARK.encode()):
                # "@mark qlora-tui 0.3.0 /home/me/.local/bin/qlora-tui"
                words = line.decode(errors="replace").rstrip("\n").split(" ", 3)
                if words[1:3] == ["qlora-tui", __version__] and len(words) == 4:
                    self._is_started = True
                    return words[3]
                raise _no_program(self._box.name, words)
        raise self.lost_error()

    def lost_error(self) -> UserError:
        """Close the channel; return its error, with the last message of ssh or the program."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()
        code = self.process.wait()
        self._reader.join(1.0)
        said = [line.strip() for line in self._errors if line.strip()][-_LAST_LINES:]
        if self._is_started and 0 <= code < _SSH_FAILED:
            return UserError(
                f"qlora-tui has ended on {self._box.name}",
                what=" ".join(said) or f"The program {how_ended(code)}.",
                fix="Correct the problem on the box, and try again.",
            )
        return UserError(
            f"{self._box.name} cannot be reached",
            what=" ".join(said) or f"ssh {how_ended(code)}.",
            fix=f"Test the connection with `ssh {shlex.quote(self._box.name)}`. Once it works, try again.",
            code=UNREACHABLE,
        )

    def ended_because(self) -> UserError:
        """Close the channel; return the error with which it ended, with the message of ssh."""
        self.process.kill()
        return self.lost_error()

    def exit_code(self) -> int:
        """Wait until the program ends; return its exit code. Raises UserError if the connection dropped."""
        code = self.process.wait()
        self._reader.join(1.0)
        if code == _SSH_FAILED:
            raise self.lost_error().replace(title=f"The connection to {self._box.name} dropped")
        return code

    def write(self, data: bytes) -> None:
        """Send bytes to the program. Raises OSError."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close(self) -> None:
        """Close the channel, which closes the input of the program on the box."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _read_errors(self, errors: IO[bytes]) -> None:
        with errors:
            while line := errors.readline(_LONGEST_TEXT_BYTES):
                text = line.decode(errors="replace").rstrip()
                self._errors = [*self._errors[-20:], text]
                if self._is_started and self._box.asks:
                    print(text, file=sys.stderr)


def install_command_there(box: str) -> str:
    """Return the command that installs this version of the program on the box."""
    install = f"uv tool install qlora-tui=={__version__}"
    return f"ssh -t {shlex.quote(box)} {shlex.quote(install)}"


def _no_program(box: str, words: list[str]) -> UserError:
    fix = f"Install this version there: `{install_command_there(box)}`, or follow docs/install.md."
    if len(words) < 4:
        return UserError(
            f"qlora-tui is not installed on {box}",
            what=f"{box} answers, but the command qlora-tui is neither in its PATH nor in ~/.local/bin.",
            fix=fix,
        )
    return UserError(
        f"{box} has another version",
        what=f"{words[3]} on the box is version {words[2]}, and this machine has {__version__}.",
        why="Both machines read the same files, so they must run the same version of qlora-tui.",
        fix=fix,
    )


def _options() -> list[str]:
    settings = {
        "ControlMaster": "auto",
        "ControlPath": f"{sockets_dir()}/%C",
        "ControlPersist": str(_KEEP_S),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ConnectTimeout": "15",
        "Compression": "yes",
        "LogLevel": "ERROR",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def sockets_dir() -> Path:
    """Return the private folder of connection sockets, with a short path. Raises UserError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime, "qlora-tui") if 0 < len(runtime) < _LONGEST_SOCKET - 10 else None
    if folder is None or not folder.parent.is_dir():
        folder = Path(tempfile.gettempdir(), f"qlora-tui-{os.getuid()}")
        if len(str(folder)) > _LONGEST_SOCKET:
            folder = Path("/tmp", folder.name)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            "No safe folder for the connection",
            what=f"{folder} belongs to another user, or other users have access to it.",
            fix=f"Delete the folder, or run `chmod 700 {folder}`.",
        )
    return folder
