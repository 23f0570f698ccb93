"""Starts the process that runs a job with llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias, TypeVar

from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.availability import install_hint, is_installed
from qlora_tui.export.llama_cpp.jobs import Compare, Compared, Quantize, Quantized
from qlora_tui.worker import run_job

T = TypeVar("T")

_LOG_LINES = 3
ProgressFn: TypeAlias = Callable[[int, int], None]


def quantize(job: Quantize) -> Quantized:
    """Quantize a GGUF file. Raises UserError."""
    return _run("quantize", job, result=Quantized, title="The GGUF file could not be quantized")


def compare(job: Compare, on_progress: ProgressFn = lambda done, total: None) -> Compared:
    """Compare a GGUF file with reference logits. Raises UserError.

    ``on_progress`` gets the rows compared, and in all; it may raise.
    """
    title = "llama.cpp could not run the GGUF file"
    return _run("compare", job, result=Compared, title=title, on_progress=on_progress)


@cache
def unavailable_because() -> str:
    """Return why llama.cpp cannot be used, without a period at the end; empty if it can.

    Loads the library once, in a separate process.
    """
    if not is_installed():
        return f"llama.cpp is not installed. {install_hint()}".rstrip(".")
    try:
        _run("load", result=type(None), title="llama.cpp could not be loaded")
    except UserError as error:
        return error.what.rstrip(".")
    return ""


def _run(
    job: str,
    *arguments: object,
    result: type[T],
    title: str,
    on_progress: ProgressFn = lambda done, total: None,
) -> T:
    if not is_installed():
        raise UserError(title, what="llama.cpp is not installed.", fix=install_hint())
    try:
        return run_job(
            f"qlora_tui.export.llama_cpp.llama_worker:{job}",
            *arguments,
            result=result,
            title=title,
            subject="llama.cpp",
            on_progress=lambda message: on_progress(message.done, message.total),
            log_lines=_LOG_LINES,
        )
    except UserError as error:
        raise error.replace(title=title) from None
