"""llama.cpp in a separate process, which may crash and frees its memory when it ends.

:class:`LlamaProcess` starts ``worker``, which runs the functions of ``bindings``. Errors become UserError.
This module imports neither the optional package that contains llama.cpp nor its library.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from qlora_tui import worker
from qlora_tui.errors import UserError
from qlora_tui.installation import install_command
from qlora_tui.process_end import ended_early

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

PACKAGE = "llama-cpp-py-sync"
_MODULE = "llama_cpp_py_sync"
_LOG_LINES = 3
_TITLE = "llama.cpp could not run the GGUF file"


def is_installed() -> bool:
    """Return whether the package is installed, without importing anything."""
    return find_spec(_MODULE) is not None


def install_hint() -> str:
    """Return how to install the package, in a sentence, or that it does not exist for this machine."""
    # The same condition as the marker of the extra in pyproject.toml.
    if sys.platform == "linux" and platform.machine() != "x86_64":
        return f"{PACKAGE}, which contains it, has no wheel for this machine (Linux {platform.machine()})."
    return f"Install it with `{install_command('qlora-tui[export]')}`."


@cache
def unavailable_because() -> str:
    """Return why llama.cpp cannot be used, without a period at the end; empty if it can be used.

    Loads the library once, in a separate process.
    """
    if not is_installed():
        return f"llama.cpp is not installed. {install_hint()}".rstrip(".")
    process = LlamaProcess("llama.cpp could not be loaded")
    try:
        process.call("load")
    except UserError as error:
        return error.what.rstrip(".")
    finally:
        process.close()
    return ""


def quantize(source: str, target: str, file_type: str) -> None:
    """Write the GGUF file ``target``, quantized to ``file_type``. Raises UserError."""
    process = LlamaProcess("The GGUF file could not be quantized")
    try:
        process.call("quantize", source, target, file_type)
    finally:
        process.close()


class Reply(msgspec.Struct, frozen=True):
    """A reply of the process: a line of JSON, optionally followed by floats."""

    value: Any = None
    floats: int = 0
    """Number of 32-bit floats that follow the line."""
    failure: str = ""
    """The error of llama.cpp; empty if the call succeeded."""


_REPLIES = msgspec.json.Decoder(Reply)


class LlamaProcess:
    """A process that runs llama.cpp. It ends with :meth:`close`, or with this process."""

    def __init__(self, title: str) -> None:
        """Start the process. ``title`` is the title of its errors. Raises UserError."""
        self._title = title
        if not is_installed():
            raise UserError(title, what="llama.cpp is not installed.", fix=install_hint())
        self._log = worker.error_file()
        self._process = subprocess.Popen(
            worker.module_argv("qlora_tui.export.llama_cpp.worker"),
            env=worker.subprocess_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # A separate session, because Ctrl-C in a terminal is meant for this process, which then ends the
            # child.
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self._process)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of ``worker`` in the process, and return its result. Raises UserError."""
        return self._call(function, arguments).value

    def call_for_floats(self, function: str, *arguments: Any) -> Floats:
        """Call a function of ``worker``, and return the float32 values it computes. Raises UserError."""
        import numpy as np  # the app loads this module and does not need numpy

        count = self._call(function, arguments).floats
        assert self._process.stdout is not None
        data = self._process.stdout.read(4 * count)
        if len(data) < 4 * count:
            raise self._ended()
        return np.frombuffer(data, np.float32)

    def _call(self, function: str, arguments: Sequence[Any]) -> Reply:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode((function, arguments)) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # the pipe is broken or closed
            line = b""
        if not line.endswith(b"\n"):
            raise self._ended()
        reply = _REPLIES.decode(line)
        if reply.failure:
            log = worker.last_lines(self._log, _LOG_LINES)
            raise UserError(self._title, what=f"llama.cpp: {reply.failure}.", why=log)
        return reply

    def _ended(self) -> UserError:
        code = self._process.wait()
        log = worker.last_lines(self._log, _LOG_LINES)
        fix = f"Try again, or install another version of {PACKAGE}, which contains llama.cpp."
        return ended_early(self._title, "llama.cpp", code, last_words=log, fix=fix)


class LlamaFile:
    """A GGUF file loaded by llama.cpp on the CPU."""

    def __init__(self, path: str, context: int, *, exact: bool = False) -> None:
        """Load a file for rows of at most ``context`` tokens. Raises UserError.

        ``exact`` computes attention in float32 throughout instead of with llama.cpp's defaults.
        """
        self._process = LlamaProcess(_TITLE)
        self.close = self._process.close
        """Ends llama.cpp."""
        self.vocabulary: int = self._process.call("open", path, context, exact)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a method of :class:`~qlora_tui.export.llama_cpp.bindings.LlamaModel`, and return its result.

        Raises UserError.
        """
        return self._process.call(function, *arguments)

    def logits(self, ids: Sequence[int], positions: Sequence[int], at_once: int) -> Iterator[Floats]:
        """Yield the next-token logits at ``positions``, in order, in blocks of shape (at most ``at_once``,
        vocabulary).

        Raises UserError.
        """
        start = 0
        for first in range(0, len(positions), at_once):
            part = positions[first : first + at_once]
            end = part[-1] + 1
            yield self.extend(ids[start:end], start=start, positions=[place - start for place in part])
            start = end

    def extend(self, ids: Sequence[int], *, start: int, positions: Sequence[int]) -> Floats:
        """Append ``ids`` after the first ``start`` tokens; return the logits (…, vocabulary) at ``positions``
        of ``ids``.

        Raises UserError.
        """
        logits = self._process.call_for_floats("compute", list(ids), list(positions), start)
        return logits.reshape(len(positions), self.vocabulary)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
