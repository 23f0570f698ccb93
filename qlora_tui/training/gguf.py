"""GGUF files as folders of 16-bit safetensors, made once and kept in the cache.

transformers reads a GGUF dequantised; quantising to NF4 at the same time is beyond it, so the model goes
through the disk. ``python -m qlora_tui.training.gguf FILE FOLDER`` converts in a process of its own, so that
torch leaves with it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.local import converted_dir
from qlora_tui.errors import WRONG_CALL, Problem
from qlora_tui.files import private_dir
from qlora_tui.training import llama_gguf
from qlora_tui.training.failure import is_full_disk


def converted(file: Path) -> Path:
    """The folder made from a GGUF file, now or earlier. Raises Problem."""
    folder = _folder(file)
    if not (folder / "config.json").exists():
        convert(file, folder)
    return folder


def kept_conversion(file: Path) -> Path | None:
    """The folder made from a GGUF file earlier; None where it has not been converted. Raises Problem."""
    folder = _folder(file)
    return folder if (folder / "config.json").exists() else None


def convert(file: Path, folder: Path) -> None:
    """Make ``folder``, all of it or nothing. Raises Problem."""
    from safetensors import SafetensorError  # no OSError, also where the disk is full

    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _convert(file, private_dir(draft))
        draft.rename(folder)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError, SafetensorError) as error:
        says = str(error).strip() or type(error).__name__
        raise Problem(
            "The GGUF file could not be converted",
            what=f"{file}: {says.splitlines()[0]}",
            fix="Free some space."
            if is_full_disk(error)
            else "Choose the model's safetensors folder or hub id instead.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    if llama_gguf.is_known(read_gguf(file)):
        llama_gguf.write(file, folder)
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        local_files_only=True,
    )
    AutoTokenizer.from_pretrained(**place, local_files_only=True).save_pretrained(folder)
    model.save_pretrained(folder)


def _folder(file: Path) -> Path:
    """Named after the file; another file of that name, or a changed one, gets another folder."""
    try:
        stat = file.stat()
    except OSError as error:
        raise Problem("No such GGUF file", what=f"{file}: {error.strerror}.") from error
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return private_dir(converted_dir()) / f"{file.stem}-{key}"


def main(arguments: list[str]) -> int:
    """Convert; a failure is told on stderr. Returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m qlora_tui.training.gguf FILE FOLDER", file=sys.stderr)
        return WRONG_CALL
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
