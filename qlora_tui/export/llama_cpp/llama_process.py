"""Starts the process that runs a job with llama.cpp."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypeAlias

import msgspec

from qlora_tui import subprocesses
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.availability import install_hint, is_installed
from qlora_tui.export.llama_cpp.jobs import (
    Compare,
    Compared,
    Job,
    JobResult,
    LlamaFailure,
    Load,
    Quantize,
    Quantized,
    RowsCompared,
)

_MESSAGES: msgspec.json.Decoder[RowsCompared | JobResult] = msgspec.json.Decoder(RowsCompared | JobResult)
_LOG_LINES = 3
ProgressFn: TypeAlias = Callable[[int, int], None]


def quantize(job: Quantize) -> Quantized:
    """Quantize a GGUF file. Raises UserError."""
    result = _run(job, "The GGUF file could not be quantized")
    assert isinstance(result, Quantized)
    return result


def compare(job: Compare, on_progress: ProgressFn = lambda done, total: None) -> Compared:
    """Compare a GGUF file with reference logits. Raises UserError.

    ``on_progress`` gets the rows compared, and in all; it may raise.
    """
    result = _run(job, "llama.cpp could not run the GGUF file", on_progress)
    assert isinstance(result, Compared)
    return result


@cache
def unavailable_because() -> str:
    """Return why llama.cpp cannot be used, without a period at the end; empty if it can.

    Loads the library once, in a separate process.
    """
    if not is_installed():
        return f"llama.cpp is not installed. {install_hint()}".rstrip(".")
    try:
        _run(Load(), "llama.cpp could not be loaded")
    except UserError as error:
        return error.what.rstrip(".")
    return ""


def _run(job: Job, title: str, on_progress: ProgressFn = lambda done, total: None) -> JobResult:
    if not is_installed():
        raise UserError(title, what="llama.cpp is not installed.", fix=install_hint())
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            subprocesses.module_argv("qlora_tui.export.llama_cpp.llama_worker"),
            env=subprocesses.subprocess_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # A separate session, because Ctrl-C in a terminal is for this process, which then ends the child.
            start_new_session=True,
        )
        result = None
        try:
            assert child.stdin and child.stdout
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(msgspec.json.encode(job))
            for line in child.stdout:
                message = decode_json(line, _MESSAGES)
                if isinstance(message, RowsCompared):
                    on_progress(message.done, message.total)
                else:
                    result = message
            child.wait()
        finally:
            # Whatever interrupts the wait, the child must not outlive it.
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
    if child.returncode or result is None:
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else f"code {child.returncode}"
        raise UserError(title, what=f"llama.cpp ended with {name}.", why=" ".join(last))
    if isinstance(result, LlamaFailure):
        raise UserError(title, what=f"llama.cpp: {result.why}.", why=" ".join(last))
    return result
