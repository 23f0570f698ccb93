"""``export hub``: adapter, merged model or GGUF file in a repository of the Hub, with a model card.

The repository is created first, so that a missing permission is known before minutes of work. What is
uploaded is written to ``uploads/`` of the cache and stays there until it is on the Hub: the same command
then continues with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath

import msgspec
from msgspec import Struct

from qlora_tui import __version__, paths, subprocesses
from qlora_tui.catalog.adapter_config import CONFIG, WEIGHTS
from qlora_tui.catalog.hub import validate_model_id
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import TOKENIZER_FILES
from qlora_tui.chat.adapter_deltas import check_unchanged
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.effect_measurement import measure_effect
from qlora_tui.chat.session import load_session, model_folder
from qlora_tui.decoding import decode_json
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_export import export_gguf
from qlora_tui.export.gguf_file.content import base_license
from qlora_tui.export.hub_upload import (
    NO_XET,
    Job,
    Message,
    Prepare,
    Prepared,
    Sending,
    Upload,
    Uploaded,
    UploadFailure,
)
from qlora_tui.export.merge import merge
from qlora_tui.export.model_card import CardForm, CardResults, render_model_card, run_rows
from qlora_tui.export.unfinished_files import draft_folder
from qlora_tui.files import atomic_write, publish
from qlora_tui.formatting import format_bytes
from qlora_tui.gpu.torch_env import offline_variables_set
from qlora_tui.runs.directory import RunDir

UPLOADS = "uploads"
"""Folder of the cache."""
_CARD = "README.md"
_FACTS = "facts.json"
_ADAPTER_FILES = (WEIGHTS, CONFIG, "generation_config.json", *TOKENIZER_FILES)
_MESSAGES: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)

StatusFn = Callable[[str], None]


class HubExport(Struct, frozen=True, kw_only=True):
    """An uploaded repository."""

    url: str
    repo: str
    form: CardForm
    is_public: bool
    files: tuple[str, ...]
    bytes: int
    commit: str
    checked: str = ""
    """How the files were compared with the trained model, in a sentence; empty if they were not."""
    effect: str = ""
    """What the adapter changes, in a sentence."""

    @property
    def summary(self) -> str:
        """Say what was uploaded and how it was checked, a sentence a line."""
        who = "public" if self.is_public else "private"
        first = f"Uploaded {len(self.files):,} files, {format_bytes(self.bytes)}; the repository is {who}."
        return "\n".join(filter(None, (first, self.checked, self.effect)))


class _Facts(Struct, frozen=True):
    """What was found out while the files were written."""

    checked: str = ""
    effect: str = ""


def export_hub(
    run: RunDir,
    source: ChatSource,
    adapter_name: str,
    repo: str,
    form: CardForm,
    file_type: str,
    *,
    is_public: bool = False,
    on_status: StatusFn = lambda words: None,
) -> HubExport:
    """Upload an adapter, its merged model or a GGUF file.

    Args:
        run: Whose events the card describes.
        source: The run's base and adapters.
        adapter_name: The adapter to upload or merge.
        repo: ``owner/name``, or ``name`` for the account of the token.
        form: What to upload.
        file_type: GGUF file type, or ``auto``.
        is_public: Whether everybody may read it.
        on_status: Called with the current activity.

    Raises:
        UserError: files already sent stay on the Hub, and are not sent again by the next call.
    """
    validate_model_id(repo)
    _require_token()
    base = resolve_model(source.recipe.model.id)
    from_hub = base.source == "hub cache"
    on_status(f"Creating {repo} on the Hub")
    prepared = _last(_messages(Prepare(repo, is_public, source.recipe.model.id if from_hub else "")))
    assert isinstance(prepared, Prepared)
    folder = paths.cache_dir() / UPLOADS / _key(source, adapter_name, form, file_type)
    if not (folder / _FACTS).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        _write_files(folder, source, adapter_name, form, file_type, on_status)
    facts = decode_json((folder / _FACTS).read_bytes(), msgspec.json.Decoder(_Facts))
    license_id = base_license(model_folder(source.recipe)) or prepared.base_license
    results = CardResults(run_rows(run), facts.effect, facts.checked, license_id)
    card = render_model_card(source.recipe, from_hub=from_hub, form=form, results=results)
    files = folder / "files"
    atomic_write(files / _CARD, card.encode())
    names = tuple(sorted(path.name for path in files.iterdir()))
    if unknown := sorted(set(prepared.files) - set(names)):
        raise UserError(
            "The repository holds other files",
            what=f"{prepared.repo} has files that this upload does not: {', '.join(unknown[:5])}.",
            why="A repository with two forms of a model confuses the programs that load it.",
            fix="Choose another name, or delete those files on the Hub.",
        )
    sizes = sum(path.stat().st_size for path in files.iterdir())
    uploaded: Message | None = None
    for message in _messages(Upload(prepared.repo, str(files), f"Upload the {form} form with qlora-tui")):
        uploaded = message
        if isinstance(message, Sending):
            place = f"{message.number} of {message.files}"
            on_status(f"Uploading {message.file} ({place}): {format_bytes(message.bytes)}")
    assert isinstance(uploaded, Uploaded)
    shutil.rmtree(folder, ignore_errors=True)
    return HubExport(
        url=uploaded.url,
        repo=prepared.repo,
        form=form,
        is_public=is_public,
        files=names,
        bytes=sizes,
        commit=uploaded.commit,
        checked=facts.checked,
        effect=facts.effect,
    )


def _require_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "No Hugging Face token",
            what="There is no token on this machine, which uploads need.",
            fix="Create one that can write, then log in with: hf auth login",
        )


def _key(source: ChatSource, adapter_name: str, form: CardForm, file_type: str) -> str:
    """Return the name of the folder of an upload: another adapter or form has another."""
    hashed = hashlib.sha256()
    adapter = Path(source.adapters[adapter_name])
    with (adapter / WEIGHTS).open("rb") as weights:
        hashed.update(hashlib.file_digest(weights, "sha256").digest())
    recipe = msgspec.json.encode(source.recipe).decode()
    hashed.update(json.dumps([form, file_type, recipe, __version__]).encode())
    return hashed.hexdigest()[:16]


def _write_files(
    folder: Path, source: ChatSource, adapter_name: str, form: CardForm, file_type: str, on_status: StatusFn
) -> None:
    with draft_folder(folder) as draft:
        files = draft / "files"
        checked = ""
        match form:
            case "adapter":
                files.mkdir()
                _copy_adapter(Path(source.adapters[adapter_name]), files, source)
            case "merged":
                check = merge(source, adapter_name, files, on_status).check
                checked = f"Checked: {check.sentence}." if check else ""
            case "gguf":
                written = export_gguf(source, adapter_name, files, (file_type,), on_status=on_status)
                checked = " ".join(f"{file.proof.sentence}." for file in written.files if file.proof)
        effect = ""
        # Without the run's data, or without memory for the model, the card has no such sentence.
        with suppress(UserError):
            effect = measure_effect(
                load_session(source, on_status), adapter_name, on_status=on_status
            ).sentence
        (draft / _FACTS).write_bytes(msgspec.json.encode(_Facts(checked, effect)))
        publish(draft, folder)


def _copy_adapter(adapter: Path, files: Path, source: ChatSource) -> None:
    """Copy what loads the adapter, without the recipe and other files with paths of this machine."""
    check_unchanged(adapter)
    for name in _ADAPTER_FILES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, files / name)
    config = json.loads((files / CONFIG).read_bytes())
    base = source.recipe.model.id
    is_on_hub = resolve_model(base).source == "hub cache"
    config["base_model_name_or_path"] = base if is_on_hub else PurePath(base).name
    (files / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _messages(job: Job) -> Iterator[Message]:
    """Run a job in a process of its own. Raises the UserError that it reports."""
    inherited = subprocesses.subprocess_env()
    environ = NO_XET | {name: inherited[name] for name in inherited.keys() - offline_variables_set}
    child = subprocess.Popen(
        subprocesses.module_argv("qlora_tui.export.hub_upload"),
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with child.stdin as jobs:
            jobs.write(msgspec.json.encode(job))
        for line in child.stdout:
            message = decode_json(line, _MESSAGES)
            if isinstance(message, UploadFailure):
                raise UserError(message.title, what=message.what, why=message.why, fix=message.fix)
            yield message
        if child.wait():
            raise UserError(
                "The upload ended early",
                what=f"Its process ended with code {child.returncode}.",
                fix="Run the same command again: files already sent are not sent again.",
            )
    finally:
        # Whatever interrupts the wait, the child must not outlive it.
        child.kill()
        child.wait()


def _last(messages: Iterator[Message]) -> Message:
    return list(messages)[-1]
