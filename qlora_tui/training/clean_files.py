"""Temporary folders through which transformers and peft see only safe files: weights, and configs that name
no code.

The libraries read more of a folder than requested: an ``adapter_config.json`` that names another base model,
Python files, templates. So they receive a folder that contains only links to the weights and cleaned copies
of the configs. Compiled kernels are loaded from a single publisher on the Hub.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_tui.catalog.adapters import CONFIG as _ADAPTER_CONFIG
from qlora_tui.catalog.adapters import WEIGHTS as _ADAPTER_WEIGHTS
from qlora_tui.catalog.adapters import load_adapter_config, with_exact_targets
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.catalog.model_validation import (
    INDEX,
    adapter_without_code,
    is_mxfp4,
    weight_files,
    without_code,
)
from qlora_tui.errors import UserError
from qlora_tui.publishing import new_draft

_CONFIGS = ("config.json", "generation_config.json")


@contextmanager
def model_view(folder: Path) -> Iterator[Path]:
    """Yield a folder with the model's weights, and its configs without keys that select code.

    Raises UserError if a config or the index cannot be read, or if no temporary folder can be created.
    """
    with _temporary() as view:
        for name in _CONFIGS:
            if (folder / name).is_file():
                config = load_config(folder / name)
                if is_mxfp4(config):
                    # transformers would load all of these experts in 16 bits: see experts/storage.py.
                    del config["quantization_config"]
                clean, dropped = without_code(config)
                _write(view / name, clean)
                _say_dropped(folder / name, dropped)
        for name in (*weight_files(folder), INDEX):
            if (folder / name).exists():
                (view / name).symlink_to((folder / name).absolute())
        yield view


@contextmanager
def adapter_view(folder: Path) -> Iterator[Path]:
    """Yield a folder with the adapter's weights, and its config without keys that select code.

    Raises UserError if the adapter cannot be used, or if no temporary folder can be created.
    """
    with _temporary() as view:
        clean, dropped = adapter_without_code(load_adapter_config(folder), str(folder))
        _write(view / _ADAPTER_CONFIG, with_exact_targets(clean, folder))
        _say_dropped(folder / _ADAPTER_CONFIG, dropped)
        (view / _ADAPTER_WEIGHTS).symlink_to((folder / _ADAPTER_WEIGHTS).absolute())
        yield view


def _write(file: Path, config: dict[str, Any]) -> None:
    file.write_text(json.dumps(config))


def _say_dropped(file: Path, keys: list[str]) -> None:
    if keys:
        print(
            f"{file}: these keys are ignored, because they select code to run: {', '.join(keys)}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _temporary() -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            view = stack.enter_context(new_draft(Path(tempfile.gettempdir())))
        except OSError as error:
            raise UserError(
                "Cannot create a temporary folder",
                what=f"A temporary folder could not be created: {error.strerror or error}.",
                fix="Free some space, or set TMPDIR to a writable folder.",
            ) from error
        yield view


PUBLISHER = "kernels-community"
"""Hugging Face's own account, which publishes flash attention."""


def pin_publisher() -> None:
    """Make transformers load kernels only from :data:`PUBLISHER`, although the code of some model families
    names other publishers.
    """
    if find_spec("kernels") is None:
        return
    from transformers.integrations import hub_kernels

    load = getattr(hub_kernels, "get_kernel_hub", None)
    if load is not None and not hasattr(load, "pinned"):
        setattr(hub_kernels, "get_kernel_hub", _of_publisher(load))  # noqa: B010  # not in its stubs everywhere


def _of_publisher(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def checked(repo_id: str, *args: Any, **settings: Any) -> Any:
        if repo_id.partition("/")[0] != PUBLISHER:
            raise ImportError(
                f"{repo_id} is not from {PUBLISHER}: kernels from other publishers are not loaded"
            )
        return load(repo_id, *args, **settings)

    setattr(checked, "pinned", True)  # noqa: B010  # a mark on a function
    return checked
