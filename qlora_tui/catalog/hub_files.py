"""Selection of the files of a Hub model to download, and which of them are already in the cache.

Safetensors, configuration and tokenizer: no files that can execute code when opened, so never ``.bin``,
``.pt`` or ``.py``. The files go to the paths that ``huggingface_hub`` uses (``blobs``, ``snapshots``,
``refs``), so that every program that reads its cache finds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from qlora_tui.catalog.hub import fetch_config, get_json, not_a_hub_problem, validate_model_id
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

_CONFIGS = (CONFIG, "generation_config.json")
HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
"""Hash of a git blob or commit, or SHA-256."""
REVISION = re.compile(r"\w[\w-]*(?:[./]\w[\w-]*)*")


class _LargeFile(Struct):
    sha256: str
    size: Count


class _Sibling(Struct, rename="camel"):
    """Fields of one file on a model's page."""

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
    """Its hash, and its name in the cache: SHA-256 for a large file, git's for a small one."""


class DownloadPlan(Struct, frozen=True):
    """Files and folder of one model download."""

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
        """Return the bytes already on disk, of complete and partial files."""
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
        """Return the path of a file until it is complete."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"


def plan_download(model_id: str, revision: str = "main") -> DownloadPlan:
    """Plan the download of ``model_id``. Nothing is written yet.

    Raises UserError when the Hub does not respond, the model is gated, or it cannot be trained here (known
    from its config and file list, before gigabytes are downloaded).
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
            fix="The Hub lists revisions under Files and versions.",
            exit_code=EXIT_USAGE,
        )
    return revision


def _parse_listing(info: Any) -> tuple[str, dict[str, HubFile]]:
    """Return the commit and the files on the model's page; of those in subfolders only chat templates."""
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
