"""Upload to the Hub, in jobs that :mod:`qlora_tui.export.hub` starts.

The exporting process holds torch and the model and is offline; the process of a job uses the network and
holds neither. The token is read as in ``huggingface_hub`` (``HF_TOKEN``, or the file of ``hf auth login``)
and never written. Messages contain no text of the client, because it may include signed addresses.

Requests go through ``HfApi``: LFS files that the Hub already has are not uploaded again, each request is
retried five times with growing waits (23 s), and all files are committed together at the end. ``hf_xet`` is
off unless the user sets ``HF_HUB_DISABLE_XET=0``, because its waits are unbounded (hf_xet 1.8 had not given
up after 150 s on a hub that answers 404), and it writes logs of its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from qlora_tui.catalog.hub import endpoint, translate_hub_errors
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes
from qlora_tui.worker import Report

NO_XET = {"HF_HUB_DISABLE_XET": "1"}
TAG = "qlora-tui"
"""Tag on every model card that this program writes."""
_LEFT_BY_THE_HUB = ".gitattributes"
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 120, 15
_AGAIN = "Run the same command again: files already sent are not sent again."


class Prepared(Struct, frozen=True):
    """A repository that this program may write to."""

    repo: str
    """Full name, ``owner/name``."""
    files: tuple[str, ...]
    """Files that the repository already has."""
    is_public: bool
    base_license: str = ""


class Uploaded(Struct, frozen=True):
    """All files are in the repository."""

    url: str
    commit: str


def prepare(repo_name: str, is_public: bool, base: str) -> Prepared:
    """Create the repository unless it exists, and list its content.

    Args:
        repo_name: ``name`` or ``owner/name``.
        is_public: Whether everybody may read the repository.
        base: Hub id of the base model, whose license is looked up; empty if the base is not from the Hub.

    Raises:
        UserError: The repository cannot be written to, or has other content.
    """
    from huggingface_hub import HfApi

    _configure_client()
    api = HfApi(endpoint=endpoint())
    with _translated(repo_name):
        repo = str(api.create_repo(repo_name, private=not is_public, exist_ok=True).repo_id)
        info = api.model_info(repo)
    files = tuple(entry.rfilename for entry in info.siblings or () if entry.rfilename != _LEFT_BY_THE_HUB)
    if not is_public and not info.private:
        raise UserError(
            "The repository is public",
            what=f"{repo} already exists, and it is public.",
            why="Uploads are private unless --public is given.",
            fix="Use --public, choose another name, or make it private on its settings page.",
        )
    if files and TAG not in (info.tags or ()):
        raise UserError(
            "The repository holds something else",
            what=f"{repo} has {len(files):,} files, but no model card by qlora-tui.",
            why="Files that this program did not upload are not replaced.",
            fix="Choose another name, or delete the repository on its settings page.",
        )
    base_license = ""
    if base:
        # If this fails, the card names no license, which the upload does not need.
        with suppress(UserError), _translated(base):
            tags = api.model_info(base).tags or ()
            base_license = next((tag[8:] for tag in tags if tag.startswith("license:")), "")
    return Prepared(repo, files, not info.private, base_license)


def upload(repo: str, folder: Path, message: str, report: Report) -> Uploaded:
    """Upload every file in a folder in one commit. After a UserError, uploaded files stay on the Hub."""
    from huggingface_hub import CommitOperationAdd, HfApi

    _configure_client()
    api = HfApi(endpoint=endpoint())
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    with _translated(repo):
        parent = api.model_info(repo).sha
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, path in zip(names, paths, strict=True)
        ]
        for number, (operation, path) in enumerate(zip(operations, paths, strict=True), 1):
            place, size = f"{number} of {len(paths)}", format_bytes(path.stat().st_size)
            report(number - 1, len(paths), f"Uploading {operation.path_in_repo} ({place}): {size}")
            api.preupload_lfs_files(repo, additions=[operation], free_memory=False)
        commit = api.create_commit(repo, operations=operations, commit_message=message, parent_commit=parent)
    return Uploaded(f"{endpoint()}/{repo}", str(commit.oid))


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """Convert exceptions to UserError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The client wraps errors that occur while it uploads a file.
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        if isinstance(cause, HfHubHTTPError) and (problem := _refusal(cause.response.status_code, repo)):
            raise problem from None
        try:
            with translate_hub_errors(repo):
                raise cause
        except UserError as problem:
            raise problem from None
        except Exception:
            # The client's text is omitted because it may contain a signed address.
            raise UserError(
                "The upload failed",
                what=f"The Hub client raised {type(cause).__name__}.",
                why="The Hub sent a response that the client does not understand, or it refused a file.",
                fix=_AGAIN,
            ) from None


def _refusal(status: int, repo: str) -> UserError | None:
    """Return the error for a status whose meaning for writers differs from its meaning for readers."""
    match status:
        case 401:
            return UserError(
                "Hugging Face token rejected",
                what="The Hub does not accept the token on this machine.",
                why="The token has expired or was revoked, or HF_TOKEN is wrong.",
                fix="Log in again with `hf auth login`, then run the same command.",
            )
        case 403:
            return UserError(
                "No permission to write to the repository",
                what=f"The token on this machine does not allow writing to {repo}.",
                why="The token is read-only, or the name belongs to another account.",
                fix=f"Create a token with write access at {endpoint()}/settings/tokens, or use another name.",
            )
        case 409 | 412:
            return UserError(
                "The repository is being changed by another upload",
                what=f"The Hub reports a conflict on {repo}.",
                why="Another upload to this repository, or to this account, is in progress.",
                fix=f"Wait until it ends. {_AGAIN}",
            )
        case 413:
            return UserError(
                "Too large for the Hub",
                what=f"The Hub does not accept a file of this size for {repo}.",
                why="A file is larger than the Hub allows, or the account has no storage left.",
                fix="Choose a smaller --quant, or free some storage on the Hub.",
            )
    return None


def _configure_client() -> None:
    """Bound the waits of the client, and silence its log, which contains signed addresses."""
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()
    default: Any = get_session()
    timeout = type(default.timeout)(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)

    def client() -> Any:
        return type(default)(event_hooks=default.event_hooks, follow_redirects=True, timeout=timeout)

    set_client_factory(client)
