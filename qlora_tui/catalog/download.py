"""Downloads a model from the Hub, as a job that outlives the process that starts it.

It downloads safetensors, configuration and tokenizer, but no files that can execute code when opened, such as
``.bin``, ``.pt`` or ``.py``. The files go to the paths that ``huggingface_hub`` uses (``blobs``,
``snapshots``, ``refs``), so that every program that reads its cache finds them. ``huggingface_hub`` 2
restarts a file after its process has died; here partial files are kept and resumed, and checked against their
hash when complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from qlora_tui.catalog.hub import (
    TooSlow,
    endpoint,
    fetch_config,
    get_json,
    is_permanent,
    network_error,
    not_a_hub_problem,
    open_response,
    pieces,
    raise_for_status,
    request_headers,
    translate_hub_errors,
    validate_model_id,
)
from qlora_tui.catalog.local_models import hub_cache_dir
from qlora_tui.catalog.model_validation import (
    CONFIG,
    INDEX,
    MAX_INDEX_BYTES,
    SINGLE,
    check_config,
    indexed_files,
    is_tokenizer_file,
    no_weights_problem,
)
from qlora_tui.decoding import Count
from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.files import atomic_write, sync
from qlora_tui.formatting import format_bytes
from qlora_tui.remote.calls import at_box, current
from qlora_tui.worker import Report, start_detached

RESERVED_BYTES = 256 << 20
"""Number of bytes that are left free on the disk."""
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds to wait before each retry after a connection error. Any progress starts the list over."""
MAX_REQUESTS = 1000
"""Maximum number of requests for one file. Each resumes where the previous one stopped."""


def download(
    model_id: str,
    report: Report = lambda done, total, text="": None,
    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S,
    revision: str = "main",
) -> Path:
    """Download a revision of ``model_id`` into the Hugging Face cache; return the folder to load.

    Resumes an earlier attempt. ``report`` is called with bytes and the name of the current file. Raises
    UserError on failure; downloaded data is kept.
    """
    plan = plan_download(model_id, revision)
    check_space(plan)
    with translate_hub_errors(model_id):
        plan.snapshot.mkdir(parents=True, exist_ok=True)
        (plan.folder / "blobs").mkdir(exist_ok=True)
        report(plan.done_bytes, plan.total_bytes)
        for file in plan.files:
            if not _is_here(plan, file):
                _fetch(plan, file, report, retry_delays_s)
            _link(plan, file)
        for folder in {plan.snapshot, *((plan.snapshot / file.name).parent for file in plan.files)}:
            sync(folder)
        if revision != plan.commit:
            ref = plan.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(ref, plan.commit, durable=True)
    return plan.snapshot


def check_space(plan: DownloadPlan) -> None:
    """Raise UserError if the missing files do not fit on the disk."""
    existing_parent = next(folder for folder in plan.folder.parents if folder.exists())
    free = shutil.disk_usage(existing_parent).free
    missing = plan.total_bytes - plan.done_bytes
    if missing and missing + RESERVED_BYTES > free:
        raise UserError(
            "Not enough disk space",
            what=(
                f"{plan.id} needs {format_bytes(missing)} more, "
                f"but {existing_parent} has {format_bytes(free)} free."
            ),
            fix="Free some space, or set HF_HOME to a folder on a larger disk.",
        )


def _is_here(plan: DownloadPlan, file: HubFile) -> bool:
    """Return whether the cache has all of ``file``, by size and hash. Deletes a damaged blob.

    If the snapshot has another file in place of a link, it may be the user's own version, and is moved aside.
    """
    blob, pointer = plan.blob(file), plan.snapshot / file.name
    present = [path for path in (blob, pointer) if path.is_file()]
    damaged = [path for path in present if _size(path) != file.size_bytes or _hash(path, file) != file.etag]
    for path in damaged:
        if path == pointer and not path.is_symlink():
            path.rename(path.with_name(f"{path.name}.replaced"))
        else:
            path.unlink(missing_ok=True)
    return len(present) > len(damaged)


def _link(plan: DownloadPlan, file: HubFile) -> None:
    """Put ``file`` into the snapshot as a link to its blob. If links cannot be created, the blob itself is
    moved there.
    """
    pointer = plan.snapshot / file.name
    if pointer.is_file():
        return
    pointer.parent.mkdir(exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(plan.blob(file), pointer.parent))
    except OSError:
        plan.blob(file).replace(pointer)


@contextmanager
def _open_partial(plan: DownloadPlan, file: HubFile) -> Iterator[IO[bytes]]:
    """Open the partial file for appending, locked for this process."""
    with plan.partial(file).open("ab") as partial:
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "The model is already being downloaded",
                what=f"Another process is downloading {file.name} of {plan.id}.",
                fix="Wait until it finishes.",
            ) from None
        yield partial


def _fetch(plan: DownloadPlan, file: HubFile, report: Report, retry_delays_s: tuple[float, ...]) -> None:
    """Download all of ``file``, and retry after disconnects.

    Raises the last error if the waits of ``retry_delays_s`` are used up without progress.
    """
    before = plan.done_bytes - min(file.size_bytes, _size(plan.partial(file)))

    def on_bytes(size: int) -> None:
        report(before + size, plan.total_bytes, file.name)

    with _open_partial(plan, file) as partial:
        waits = iter(retry_delays_s)
        farthest = partial.seek(0, os.SEEK_END)
        for _ in range(MAX_REQUESTS):
            if partial.seek(0, os.SEEK_END) >= file.size_bytes:
                break
            failure: Exception = ConnectionError("fewer bytes than the file has")
            try:
                _append(plan, file, partial, on_bytes)
            except (network_error(), ConnectionError) as error:
                if is_permanent(error):
                    raise
                failure = error
            size = partial.seek(0, os.SEEK_END)
            if size > farthest and not isinstance(failure, TooSlow):
                farthest = size
                waits = iter(retry_delays_s)
            if size < file.size_bytes:
                if (wait := next(waits, None)) is None:
                    raise failure
                time.sleep(wait)
        partial.flush()
        if _size(plan.partial(file)) != file.size_bytes or _hash(plan.partial(file), file) != file.etag:
            raise _damaged(plan, file, partial, "does not match the hash on the Hub")
        # Sync before the rename: a power cut must not leave an empty file under the blob's name.
        os.fsync(partial.fileno())
        plan.partial(file).replace(plan.blob(file))
        sync(plan.blob(file).parent)


def _damaged(plan: DownloadPlan, file: HubFile, partial: IO[bytes], what: str) -> UserError:
    """Empty the partial file, and return the error to raise."""
    partial.truncate(0)
    return UserError(
        "The download is damaged",
        what=f"{file.name} of {plan.id} {what}.",
        why="The file was changed in transit, or by a disk error.",
        fix="Download the model again. This file is then downloaded from the start.",
    )


def _append(plan: DownloadPlan, file: HubFile, partial: IO[bytes], on_bytes: Callable[[int], None]) -> None:
    """Request the missing part of ``file`` once."""
    size = partial.tell()
    headers = request_headers() | {"Range": f"bytes={size}-"}
    url = f"{endpoint()}/{plan.id}/resolve/{plan.commit}/{file.name}"
    with open_response(url, headers) as response:
        if response.status_code != 206:
            size = 0
            if response.status_code == 416:
                partial.truncate(0)
                return
            raise_for_status(response)
            partial.truncate(0)
        for chunk in pieces(response):
            size += len(chunk)
            if size > file.size_bytes:
                raise _damaged(
                    plan, file, partial, f"is longer than the {file.size_bytes:,} bytes it should have"
                )
            partial.write(chunk)
            # The next download continues from this position, however this process ends.
            partial.flush()
            on_bytes(size)


def _hash(path: Path, file: HubFile) -> str:
    """Return the Hub's hash of ``path``: SHA-256, or git's blob hash."""
    if len(file.etag) == 64:
        hashed = hashlib.sha256()
    else:
        hashed = hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashed).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def start_download(model_id: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process that downloads a model, and that outlives this process and its terminal. Messages about
    the download arrive on ``stdout`` of the returned process; its error output is written to ``errors``.

    Raises UserError if the download is for another machine that is not connected.
    """
    job = "qlora_tui.catalog.download:download"
    if (link := current()) is not None:
        return link.start_job(job, model_id, errors=errors)
    return start_detached(job, model_id, stdout=subprocess.PIPE, stderr=errors)


_CONFIGS = (CONFIG, "generation_config.json")
HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
"""Pattern of the hash of a git blob or commit, or of SHA-256."""
REVISION = re.compile(r"\w[\w-]*(?:[./]\w[\w-]*)*")


class _LargeFile(Struct):
    sha256: str
    size: Count


class _Sibling(Struct, rename="camel"):
    """What the Hub reports about one file of a model."""

    rfilename: str
    size: Count | None = None
    blob_id: str | None = None
    lfs: _LargeFile | None = None


class _ModelPage(Struct):
    sha: str
    siblings: list[_Sibling]


class HubFile(Struct, frozen=True):
    """One file to download."""

    name: str
    size_bytes: int
    etag: str
    """Hash of the file, which is its name in the cache: SHA-256 for a large file, git's for a small one."""


class DownloadPlan(Struct, frozen=True):
    """The files and the folder of one model download."""

    id: str
    commit: str
    files: tuple[HubFile, ...]
    folder: Path
    """``models--org--name`` in the cache."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def done_bytes(self) -> int:
        """Return the number of bytes already on disk, in complete and partial files."""
        return sum(min(file.size_bytes, self._downloaded_bytes(file)) for file in self.files)

    def _downloaded_bytes(self, file: HubFile) -> int:
        for path in (self.blob(file), self.partial(file)):
            try:
                return path.stat().st_size
            except OSError:
                continue
        return 0

    @property
    def snapshot(self) -> Path:
        """Return the folder that transformers loads."""
        return self.folder / "snapshots" / self.commit

    def blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.etag

    def partial(self, file: HubFile) -> Path:
        """Return the path of a file until its download is complete."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"


@at_box
def plan_download(model_id: str, revision: str = "main") -> DownloadPlan:
    """Plan the download of ``model_id`` without writing anything.

    Raises UserError if the Hub does not respond, if the model is gated, or if its config and file list show
    that the model cannot be trained here. Such a model is refused before gigabytes are downloaded.
    """
    page = f"api/models/{validate_model_id(model_id)}/revision/{quote(validate_revision(revision), safe='')}"
    info = get_json(page, {"blobs": "true"}, model_id)
    commit, listed = _parse_listing(info)
    config = fetch_config(model_id, commit) if CONFIG in listed else None
    if config is not None and (refusal := check_config(config, model_id)[1]) is not None:
        raise refusal
    weights = _weight_names(listed, model_id, commit)
    small_files = [name for name in listed if name in _CONFIGS or is_tokenizer_file(name)]
    folder = hub_cache_dir() / f"models--{model_id.replace('/', '--')}"
    return DownloadPlan(model_id, commit, tuple(listed[name] for name in (*small_files, *weights)), folder)


def validate_revision(revision: str) -> str:
    """Return the revision if it is safe in a URL and a path. Raises UserError otherwise."""
    if not REVISION.fullmatch(revision):
        raise UserError(
            "Invalid revision",
            what=f"{revision!r} is not the name of a branch, a tag or a commit.",
            fix="Choose a revision that the Hub lists under Files and versions.",
            exit_code=EXIT_USAGE,
        )
    return revision


def _parse_listing(info: Any) -> tuple[str, dict[str, HubFile]]:
    """Return the commit and the files on the model's page; from subfolders only chat templates."""
    try:
        page = msgspec.convert(info, _ModelPage)
    except msgspec.ValidationError:
        raise not_a_hub_problem() from None
    names = ((sibling, sibling.rfilename) for sibling in page.siblings)
    files = [_to_file(sibling) for sibling, name in names if "/" not in name or is_tokenizer_file(name)]
    if not all(HASH.fullmatch(etag) for etag in (page.sha, *(file.etag for file in files))):
        raise not_a_hub_problem()
    return page.sha, {file.name: file for file in files}


def _to_file(sibling: _Sibling) -> HubFile:
    if sibling.lfs is not None:
        return HubFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256)
    if sibling.size is None or sibling.blob_id is None:
        raise not_a_hub_problem()
    return HubFile(sibling.rfilename, sibling.size, sibling.blob_id)


def _weight_names(listed: dict[str, HubFile], model_id: str, commit: str) -> Iterable[str]:
    if SINGLE in listed:
        return [SINGLE]
    if INDEX not in listed:
        raise no_weights_problem(listed, model_id)
    path = f"{model_id}/resolve/{commit}/{INDEX}"
    index = get_json(path, model_id=model_id, max_bytes=MAX_INDEX_BYTES)
    if not isinstance(index, dict):
        raise not_a_hub_problem()
    shards = indexed_files(index, f"{model_id}, {INDEX}")
    if missing := [shard for shard in shards if shard not in listed]:
        raise no_weights_problem(listed, f"{model_id} (without {missing[0]})")
    return [INDEX, *shards]
