"""Finds the models on this machine, looks them up by name, and reads architectures without weights.

Three places are searched: the Hugging Face cache, the folders that the user names, and the folder of models
converted by this program. The first two may also contain GGUF files. The cache is searched here rather than
through ``huggingface_hub``, whose import alone takes longer than searching a hundred models.
``load_architecture`` is enough for an estimate before any download: it also reads a single ``config.json``,
or a stored one that was fetched from the Hub.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import load_config, parse_architecture
from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.catalog.gguf_config import to_hf_config
from qlora_tui.catalog.hub import fetch_config
from qlora_tui.catalog.model_validation import (
    CONFIG,
    UNUSABLE_TOKENIZER,
    MissingFilesError,
    check_config,
    check_folder,
    quantized_refusal,
    tensor_entries,
    tokenizer_problem,
    weight_files,
)
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import atomic_write, list_folder, private_dir, read_bounded
from qlora_tui.paths import cache_dir
from qlora_tui.remote.calls import at_box

ModelSource = Literal["hub cache", "folder", "gguf", "converted"]
_PREFIX_CHARACTERS = 3
"""Minimum length of the beginning of a name that counts as a close match."""
MAX_DEPTH = 3
"""Number of levels of subfolders that are searched in a user's folder."""


class LocalModel(Struct, frozen=True):
    """A model on this machine, whether it can be trained or not."""

    id: str
    """Value of ``model.id`` in a recipe: ``org/name`` from the Hub, a converted model's name, or a path."""
    name: str
    """Name shown in lists."""
    path: Path
    """The folder to load, or the GGUF file."""
    source: ModelSource
    size_bytes: int
    architecture: Architecture | None
    refusal: UserError | None
    """Why the model cannot be trained; None if it can."""

    @property
    def loading_refusal(self) -> UserError | None:
        """Why the weights cannot be used. Estimates and merges do not need a tokenizer; training does."""
        is_loadable = self.refusal is None or self.refusal.code == UNUSABLE_TOKENIZER
        return None if is_loadable else self.refusal


class ModelFiles(Struct, frozen=True):
    """Files of a trainable local model, for the trainer."""

    id: str
    """Value of ``LocalModel.id``, valid in every working directory."""
    folder: Path
    gguf_file: str | None
    """Name of the GGUF file in ``folder`` that must first be converted; None for other models."""
    source: ModelSource
    architecture: Architecture


def hub_cache_dir() -> Path:
    """Return the model folder of ``huggingface_hub``, following its ``constants.py`` without importing it."""
    environ = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(os.path.expandvars(environ[variable])).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def converted_dir() -> Path:
    """Return the folder of models converted by this program, one subfolder each."""
    return paths.cache_dir() / "models"


@at_box
def list_local_models(folders: Sequence[Path] = ()) -> list[LocalModel]:
    """Return every model on this machine, trainable ones first, then by name.

    ``folders`` are the user's configured folders; missing ones are skipped. Takes about 2 ms per model.
    """
    by_path: dict[Path, LocalModel] = {}
    for model in (*_hub_models(), *_converted_models(), *_folder_models(folders)):
        by_path.setdefault(model.path, model)
    return sorted(by_path.values(), key=lambda model: (model.refusal is not None, model.name.lower()))


@at_box
def resolve_model(model_id: str) -> ModelFiles:
    """Return the files of a recipe's model: a cached Hub ID, a converted model, a folder or a GGUF file.

    The architecture is exact, which takes seconds at the first request (:mod:`qlora_tui.catalog.described`).
    Raises UserError if the model is not on this machine (the error names close matches), or if its weights
    cannot be used or are truncated.
    """
    files = find_files(model_id)
    if not files.architecture.is_outline:
        return files
    return msgspec.structs.replace(files, architecture=described.describe(load_model_config(model_id)))


@at_box
def find_files(model_id: str) -> ModelFiles:
    """Return the files of a model, with its architecture, which may be only an outline.

    A missing tokenizer is not an error here, because estimates and merges do not need one.
    """
    model = _find_model(model_id)
    if model is None:
        raise model_not_found(model_id)
    if model.loading_refusal is not None:
        raise model.loading_refusal
    assert model.architecture is not None  # a model without an architecture is rejected
    if model.source == "gguf":
        return ModelFiles(model.id, model.path.parent, model.path.name, "gguf", model.architecture)
    for file in (model.path / name for name in weight_files(model.path)):
        try:
            entries = tensor_entries(file)
        except ValueError as damage:
            raise UserError(
                "Damaged weights",
                what=f"{file}: {damage}.",
                why="A copy or download that was interrupted is the usual cause.",
                fix="Delete the file and download or copy it again.",
            ) from None
        if not model.architecture.quantized_as and (refusal := quantized_refusal(file, entries)):
            raise refusal
    return ModelFiles(model.id, model.path, None, model.source, model.architecture)


@at_box
def training_refusal(model_id: str) -> UserError | None:
    """Return why a model cannot be trained, from its config and the names of its files; None if it can.

    A model may have a known architecture, and therefore an estimate, and still not be trainable: a Hub model
    that was not downloaded, or a folder without weights. For a GGUF file the result is None without a check,
    because a GGUF file whose architecture is known can be trained.
    """
    if model_id.endswith(".gguf"):
        return None
    model = _find_model(model_id)
    if model is None:
        # Without suggestions, which would search all models.
        return ModelNotFoundError(model_id, fix="Download it on the Model screen.")
    return model.refusal


class ModelNotFoundError(UserError):
    """Raised if no model on this machine has the name."""

    def __init__(self, model_id: str, *, why: str = "", fix: str) -> None:
        what = f"The model {model_id!r} is not on this machine."
        super().__init__("Model not found", what=what, why=why, fix=fix, exit_code=EXIT_USAGE)


def model_not_found(model_id: str) -> ModelNotFoundError:
    """Build the error for a name that no model on this machine has."""
    names = {model.id.lower(): model.id for model in list_local_models()}
    short = {name.rpartition("/")[2]: model for name, model in names.items()}
    lowered = model_id.lower()
    close_matches = [names[key] for key in difflib.get_close_matches(lowered, names, n=3, cutoff=0.6)]
    close_matches += [
        short[key] for key in difflib.get_close_matches(lowered.rpartition("/")[2], short, n=3, cutoff=0.6)
    ]
    if len(lowered) >= _PREFIX_CHARACTERS:
        close_matches += [model for name, model in short.items() if name.startswith(lowered)]
    hint = f"Did you mean {' or '.join(dict.fromkeys(close_matches[:3]))}? " if close_matches else ""
    looks_like_path = _is_path(model_id) or model_id.count("/") > 1
    advice = (
        "Check the path."
        if looks_like_path
        else f"Download it on the Model screen, or with: qlora-tui download {model_id}"
    )
    return ModelNotFoundError(
        model_id,
        why="There is no such file or folder."
        if looks_like_path
        else f"Looked in {hub_cache_dir()} and {converted_dir()}.",
        fix=hint + advice,
    )


def _is_path(model_id: str) -> bool:
    return model_id.startswith(("/", "./", "../", "~")) or model_id.endswith(".gguf")


def _find_model(model_id: str) -> LocalModel | None:
    if not model_id:
        return None
    path = Path(model_id)
    try:
        path = path.expanduser().absolute()
        if path.suffix == ".gguf" and path.is_file():
            return _read_gguf_model(path)
        if path.is_dir() and (_is_path(model_id) or (path / CONFIG).is_file()):
            return _read_folder(path, "folder", path.name, str(path))
        if _is_path(model_id) or ".." in path.parts:
            return None
        if (cached := hub_cache_dir() / f"models--{model_id.replace('/', '--')}").is_dir():
            return _read_cached_model(cached)
        if path.name == model_id and (converted := converted_dir() / model_id).is_dir():
            return _read_folder(converted, "converted", converted.name, converted.name)
    except PermissionError as error:
        return LocalModel(model_id, model_id, path, "folder", 0, None, _unreadable(path, error))
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name that is too long, contains a NUL, or uses the home of an unknown user
        pass
    return None


def _hub_models() -> Iterator[LocalModel]:
    for folder in _subfolders(hub_cache_dir()):
        if folder.name.startswith("models--"):
            snapshot = _snapshot(folder)
            ggufs = [file for file in _files(snapshot) if file.suffix == ".gguf"] if snapshot else []
            yield from map(_read_gguf_model, ggufs)
            if not ggufs:
                yield _read_cached_model(folder)


def _read_cached_model(folder: Path) -> LocalModel:
    """Read the model of one ``models--org--name`` folder: the snapshot of ``main``, or the newest one."""
    name = folder.name.removeprefix("models--").replace("--", "/")
    snapshot = _snapshot(folder)
    if snapshot is None or not (snapshot / CONFIG).is_file():
        blobs = sum(_size_bytes(file) for file in _files(folder / "blobs"))
        return LocalModel(
            name, name, snapshot or folder, "hub cache", blobs, None, _incomplete_download(name)
        )
    model = _read_folder(snapshot, "hub cache", name, name)
    if model.refusal is not None and any((folder / "blobs").glob("*.incomplete")):
        return msgspec.structs.replace(model, refusal=_incomplete_download(name))
    return model


def _snapshot(folder: Path) -> Path | None:
    try:
        pointed_to = folder / "snapshots" / read_bounded(folder / "refs" / "main", 4096).decode().strip()
        if pointed_to.is_dir():
            return pointed_to
    except (OSError, ValueError):
        pass
    snapshots = list(_subfolders(folder / "snapshots"))
    return max(snapshots, key=_modified_s, default=None)


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _incomplete_download(name: str) -> UserError:
    return MissingFilesError(
        "Incomplete download",
        what=f"{name} is only partly in the cache.",
        why="A download was interrupted, or only individual files were downloaded.",
        fix=f"Resume it on the Model screen or with `qlora-tui download {name}`; finished files are not "
        "downloaded again.",
    )


def _converted_models() -> Iterator[LocalModel]:
    for folder in _subfolders(converted_dir()):
        if not folder.name.startswith("."):
            yield _read_folder(folder, "converted", folder.name, folder.name)


def _folder_models(folders: Iterable[Path]) -> Iterator[LocalModel]:
    for folder in folders:
        top = folder.expanduser().absolute()
        if top.suffix == ".gguf" and top.is_file():
            yield _read_gguf_model(top)
        else:
            yield from _walk(top, MAX_DEPTH)


def _walk(folder: Path, depth: int) -> Iterator[LocalModel]:
    """Yield models in and below ``folder``. A folder that is itself a model is not searched further."""
    if (refusal := _unsearchable(folder)) is not None:
        yield LocalModel(str(folder), folder.name, folder, "folder", 0, None, refusal)
        return
    files = list(_files(folder))
    if any(file.name in (CONFIG, "pytorch_model.bin") or file.suffix == ".safetensors" for file in files):
        yield _read_folder(folder, "folder", folder.name, str(folder))
        return
    yield from (_read_gguf_model(file) for file in files if file.suffix == ".gguf")
    if depth:
        for child in _subfolders(folder):
            if not child.name.startswith("."):
                yield from _walk(child, depth - 1)


def _unsearchable(folder: Path) -> UserError | None:
    """Return why a folder cannot be searched for models; None if it can, or if it is not a folder."""
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return _unreadable(folder, error)
    return None


def _read_folder(folder: Path, source: ModelSource, name: str, model_id: str) -> LocalModel:
    try:
        architecture, refusal = check_folder(folder, name)
        refusal = refusal or tokenizer_problem(folder, name)
        size_bytes = sum(file.stat().st_size for file in _files(folder))
    except Exception as error:  # any failure to read one model must not hide the others
        architecture, size_bytes, refusal = None, 0, _unreadable(folder, error)
    return LocalModel(model_id, name, folder, source, size_bytes, architecture, refusal)


def _read_gguf_model(file: Path) -> LocalModel:
    architecture, refusal, size_bytes = None, None, 0
    try:
        size_bytes = file.stat().st_size
        architecture = parse_architecture(to_hf_config(read_gguf(file), file))
    except UserError as problem:
        refusal = problem
    except Exception as error:  # any failure to read one model must not hide the others
        refusal = _unreadable(file, error)
    return LocalModel(str(file), file.stem, file, "gguf", size_bytes, architecture, refusal)


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError):
        return UserError(
            "The model cannot be read",
            what=f"{error.filename or path}: {error.strerror or error}.",
            why="",
            fix="Check that you have permission to read the model's folder and everything in it.",
        )
    return UserError(
        "The model cannot be read",
        what=f"{path}: {type(error).__name__}: {error}.",
        why="A file of the model is damaged or malicious.",
        fix="Download the model again, or move it elsewhere.",
    )


def _subfolders(folder: Path) -> Iterator[Path]:
    yield from _entries(folder, folders=True)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of ``folder``, including links to files but not broken links."""
    yield from _entries(folder, folders=False)


def _entries(folder: Path, *, folders: bool) -> Iterator[Path]:
    for entry in list_folder(folder):
        try:
            if entry.is_dir() if folders else entry.is_file():
                yield entry
        except OSError:
            continue


def store_config(model_id: str, config: dict[str, Any]) -> None:
    """Store the config of a Hub model. Raises OSError."""
    path = _path(model_id)
    private_dir(path.parent)
    atomic_write(path, msgspec.json.encode(config))


def stored_config(model_id: str) -> Path | None:
    """Return the file with the stored config of a Hub model; None if it was never fetched."""
    path = _path(model_id)
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):
        # The name may be too long for the file system, or contain a NUL.
        return None


def _path(model_id: str) -> Path:
    return cache_dir() / "configs" / f"{model_id.replace('/', '--')}.json"


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@at_box
def load_architecture(model_id: str) -> Architecture:
    """Load the architecture of a local model, of a folder with only a ``config.json``, or of such a file.

    For a Hub model whose weights are not on this machine, the config that :func:`fetch_architecture` stored
    is used. If the exact architecture would take time (:func:`describe_model`), an outline is returned.
    Raises UserError if the model is not on this machine, or its config shows that it cannot be trained.
    """
    return _trainable(load_model_config(model_id), model_id)


def _trainable(config: dict[str, Any], model_id: str) -> Architecture:
    """Return the architecture of a config. Raises UserError if a launch would refuse the model."""
    architecture, refusal = check_config(config, model_id)
    if architecture is None or refusal is not None:
        assert refusal is not None
        raise refusal
    return architecture


@at_box
def describe_model(model_id: str, should_stop: Callable[[], bool] = lambda: False) -> Architecture:
    """Return the exact architecture of a model, a folder or a file; takes seconds the first time.

    Raises JobStopped, and UserError if the model cannot be found or trained, or transformers cannot build it.
    """
    config = load_model_config(model_id)
    architecture = _trainable(config, model_id)
    return described.describe(config, should_stop) if architecture.is_outline else architecture


@at_box
def describe_models(models: Sequence[LocalModel], should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Read the exact architectures of all models that can be estimated and have only an outline.

    Returns whether there was such a model. Raises JobStopped.
    """
    configs = []
    for model in models:
        if model.loading_refusal is None and model.architecture and model.architecture.is_outline:
            with suppress(UserError):
                configs.append(load_model_config(str(model.path)))
    described.describe_all(configs, should_stop)
    return bool(configs)


def is_fetchable(model_id: str) -> bool:
    """Return whether the name has the form of a Hub ID, publisher/model."""
    return _HUB_ID.fullmatch(model_id) is not None


def fetch_architecture(model_id: str, revision: str = "main") -> Architecture:
    """Fetch only the ``config.json`` of a Hub model, and store it for later estimates.

    Raises UserError if the Hub cannot be reached or has no such model.
    """
    try:
        config = fetch_config(model_id, revision)
    except UserError as problem:
        raise problem.replace(
            what=f"{model_id} is not on this machine. {problem.what}",
            fix=f"{problem.fix} An estimate needs only the model's config.json: "
            "copy it into a folder and give that folder as the model.",
        ) from problem
    architecture = _trainable(config, model_id)
    with suppress(OSError):
        store_config(model_id, config)
    return architecture


@at_box
def load_model_config(model_id: str) -> dict[str, Any]:
    """Load the ``config.json`` of a model, a folder or a file, or the config of a GGUF file's header.

    Raises UserError if it cannot be read.
    """
    file = _config_file(model_id)
    try:
        files = None if file else find_files(model_id)
        if files is not None and files.gguf_file is not None:
            gguf = files.folder / files.gguf_file
            return to_hf_config(read_gguf(gguf), gguf)
        file = file or (files.folder if files else Path()) / CONFIG
    except ModelNotFoundError:
        if (file := stored_config(model_id)) is None:
            raise
    return load_config(file)


def _config_file(model_id: str) -> Path | None:
    path = Path(model_id).expanduser()
    for config in (path / "config.json", path):
        if config.suffix == ".json" and config.is_file():
            return config
    return None
