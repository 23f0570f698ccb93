"""``export hub``: adapter, merged model or GGUF file in a repository of the Hub, with a model card.

First, everything that can be checked is checked. Then the repository is created, so that a missing permission
is known before minutes of work. The jobs in ``hub_upload`` use the network. Nothing that is uploaded names a
path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from qlora_tui import paths
from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.adapters.deltas import check_unchanged
from qlora_tui.adapters.merged_weights import merged_weights
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS
from qlora_tui.catalog.gguf_file_types import AUTO, LADDER, estimated_bytes
from qlora_tui.catalog.hub import validate_model_id
from qlora_tui.catalog.local_models import find_files, resolve_model
from qlora_tui.catalog.model_validation import copy_files, is_tokenizer_file, tokenizer_files
from qlora_tui.chat.chat_types import ADAPTER, ChatSource
from qlora_tui.chat.effect_measurement import measure_effect
from qlora_tui.chat.loading import chat_tokenizer, load_session
from qlora_tui.errors import UserError
from qlora_tui.export.gguf import check_file_types, export_gguf
from qlora_tui.export.gguf_file.content import base_license, gguf_content
from qlora_tui.export.hub_upload import NO_XET, Prepared, Uploaded
from qlora_tui.export.merge import merge
from qlora_tui.export.model_card import CardForm, CardResults, render_model_card, run_rows
from qlora_tui.export.unfinished_files import draft_folder, require_space
from qlora_tui.formatting import format_bytes, short_model_name
from qlora_tui.gpu.torch_env import online_environ
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import COMPARED_TOKENS
from qlora_tui.worker import run_job

_CARD = "README.md"
_ADAPTER_FILES = (WEIGHTS, CONFIG, "generation_config.json")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", CONFIG)
_BASE = "base_model_name_or_path"
_PATH_KEYS = ("name_or_path", "_file")
"""Suffixes of config keys with the path that a model or tokenizer was loaded from. No program reads these
keys.
"""
_CREATION_S = 120.0
"""Maximum seconds to create the repository. The library retries forever if another client creates it."""

StatusFn = Callable[[str], None]
T = TypeVar("T")


class HubExport(Struct, frozen=True, kw_only=True):
    """An uploaded repository."""

    url: str
    repo: str
    form: CardForm
    is_public: bool
    """Whether everybody can read the repository, according to the Hub."""
    files: tuple[str, ...]
    bytes: int
    commit: str
    stays_private: bool = False
    """Whether the repository is private although a public one was requested."""
    checked: str = ""
    """How the files were compared with the trained model, in sentences; empty for an adapter."""
    effect: str = ""
    """What the adapter changes, in a sentence."""
    unmeasured_because: str = ""
    """Why the effect was not measured."""

    @property
    def summary(self) -> str:
        """What was uploaded and how it was checked, with a line for each sentence."""
        who = "public" if self.is_public else "private"
        lines = [f"Uploaded {len(self.files):,} files, {format_bytes(self.bytes)}; the repository is {who}."]
        if self.stays_private:
            lines.append("--public does not change an existing repository; its settings page does.")
        lines += [self.checked, self.effect]
        if self.unmeasured_because:
            lines.append(f"The effect of the adapter was not measured: {self.unmeasured_because}.")
        return "\n".join(filter(None, lines))


def export_hub(
    run: RunDir,
    source: ChatSource,
    adapter_name: str,
    repo: str,
    form: CardForm,
    file_type: str,
    *,
    is_public: bool = False,
    compared_tokens: int = COMPARED_TOKENS,
    on_status: StatusFn = lambda words: None,
) -> HubExport:
    """Upload an adapter, its merged model or a GGUF file.

    Args:
        run: The run whose events the card describes.
        source: The run's base and adapters.
        adapter_name: The adapter to upload or merge.
        repo: ``owner/name``, or ``name`` for the account of the token.
        form: What to upload.
        file_type: GGUF file type, or ``auto``.
        is_public: Whether everybody may read the repository.
        compared_tokens: Maximum number of trained tokens at which answers are compared.
        on_status: Called with the current activity.

    Raises:
        UserError: The upload failed. Files already uploaded stay on the Hub, and the next call does not
            upload them again.
    """
    validate_model_id(repo)
    _require_token()
    _check_form(source, adapter_name, form, file_type, on_status)
    from_hub = find_files(source.recipe.model.id).source == "hub cache"
    with draft_folder(paths.cache_dir() / "uploads" / f"{repo.replace('/', '--')}-{form}") as draft:
        on_status(f"Creating {repo} on the Hub")
        base = source.recipe.model.id if from_hub else ""
        prepared = _run("prepare", repo, is_public, base, result=Prepared, deadline_s=_CREATION_S)
        # Check before minutes of work, and again once the exact names are known.
        _refuse_other_files(prepared, {name for name in prepared.files if _may_hold(form, name)})
        files = draft / "files"
        written = _write(files, source, adapter_name, form, file_type, on_status, compared_tokens)
        _remove_paths(files, source)
        effect, unmeasured = "", ""
        try:
            session = load_session(source, on_status)
            effect = measure_effect(session, adapter_name, on_status=on_status).sentence
        except UserError as problem:
            # For example, if the run's data is missing or memory is too small for the model.
            unmeasured = f"{problem.title}: {problem.what}".rstrip(".")
        license_id = base_license(model_folder(source.recipe)) or prepared.base_license
        rows = run_rows(run)
        if adapter_name != ADAPTER:
            rows = (("Checkpoint", adapter_name.replace("-", " ")), *rows)
        card = render_model_card(
            source.recipe,
            from_hub=from_hub,
            form=form,
            repo=prepared.repo,
            results=CardResults(rows, effect, "\n\n".join(filter(None, written.card)), license_id),
            is_dequantized=written.is_dequantized,
        )
        (files / _CARD).write_text(card, encoding="utf-8")
        sizes = {
            path.relative_to(files).as_posix(): path.stat().st_size
            for path in sorted(files.rglob("*"))
            if path.is_file()
        }
        _refuse_other_files(prepared, set(sizes))
        message = f"Upload the {form} form with qlora-tui"
        uploaded = _run("upload", prepared.repo, files, message, result=Uploaded, on_status=on_status)
    return HubExport(
        url=uploaded.url,
        repo=prepared.repo,
        form=form,
        is_public=prepared.is_public,
        stays_private=is_public and not prepared.is_public,
        files=tuple(sizes),
        bytes=sum(sizes.values()),
        commit=uploaded.commit,
        checked="\n".join(filter(None, written.checked)),
        effect=effect,
        unmeasured_because=unmeasured,
    )


def _require_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "No Hugging Face token",
            what="Uploads need a token, and there is none on this machine.",
            fix="Create a token with write access, then log in with: hf auth login",
        )


def _check_form(
    source: ChatSource, adapter_name: str, form: CardForm, file_type: str, on_status: StatusFn
) -> None:
    """Raise UserError if the form cannot be written, as far as this is known before anything is computed."""
    adapter = Path(source.adapters[adapter_name])
    if form == "adapter":
        check_unchanged(adapter)
        return
    kinds = LADDER if file_type == AUTO else (file_type,)
    if form == "gguf":
        check_file_types(kinds)
    weights = merged_weights(source.recipe, adapter, on_status)
    if form == "gguf":
        gguf_content(source, chat_tokenizer(source, weights.folder), weights)
    architecture = resolve_model(source.recipe.model.id).architecture
    needed = estimated_bytes(architecture, kinds[0]) if form == "gguf" else 2 * architecture.total_params
    require_space(paths.cache_dir(), needed, "The upload")


def _may_hold(form: CardForm, name: str) -> bool:
    """Return whether an upload of this form may contain a file with this name."""
    if name == _CARD:
        return True
    match form:
        case "adapter":
            return name in _ADAPTER_FILES or is_tokenizer_file(name)
        case "merged":
            return not name.endswith(".gguf") and name not in (WEIGHTS, CONFIG)
        case "gguf":
            return name.endswith(".gguf")


def _refuse_other_files(prepared: Prepared, names: set[str]) -> None:
    if unknown := sorted(set(prepared.files) - names):
        raise UserError(
            "The repository holds other files",
            what=f"{prepared.repo} has files that this upload does not: {', '.join(unknown[:5])}.",
            why="A repository with two forms of a model confuses the programs that load it.",
            fix="Choose another name, or delete those files on the Hub.",
        )


def _run(
    job: str,
    *arguments: object,
    result: type[T],
    on_status: StatusFn = lambda activity: None,
    deadline_s: float | None = None,
) -> T:
    return run_job(
        f"qlora_tui.export.hub_upload:{job}",
        *arguments,
        result=result,
        title="The repository could not be created" if job == "prepare" else "The upload ended early",
        subject="The process that uploads",
        fix="Run the same command again: files already sent are not sent again.",
        on_progress=lambda message: on_status(message.text),
        deadline_s=deadline_s,
        shows_stderr=True,
        environ=NO_XET | online_environ(),
    )


@dataclass(frozen=True)
class _Written:
    """Measurements taken while the files were written."""

    checked: tuple[str, ...] = ()
    """How the files were compared with the trained model, in sentences for the user who exports."""
    card: tuple[str, ...] = ()
    """How the files were compared with the trained model, for readers of the model card."""
    is_dequantized: bool = False
    """Whether the adapter was merged into the dequantized base weights of training."""


def _write(
    files: Path,
    source: ChatSource,
    adapter_name: str,
    form: CardForm,
    file_type: str,
    on_status: StatusFn,
    compared_tokens: int,
) -> _Written:
    """Write everything except the model card. Raises UserError."""
    match form:
        case "adapter":
            adapter = Path(source.adapters[adapter_name])
            files.mkdir()
            # Upload the files that load the adapter, without the recipe and other files of the run.
            names = [name for name in _ADAPTER_FILES if (adapter / name).is_file()]
            copy_files(adapter, files, [*names, *tokenizer_files(adapter)])
            return _Written()
        case "merged":
            merged = merge(source, adapter_name, files, on_status, compared_tokens=compared_tokens)
            compared = (
                merged.check_sentence
                if merged.check
                else "The merged model was not compared with base and adapter."
            )
            return _Written(
                checked=(merged.check_sentence, merged.base.sentence),
                card=(compared, merged.base.sentence),
                is_dequantized=merged.base.chosen == "dequantized",
            )
        case "gguf":
            written = export_gguf(
                source,
                adapter_name,
                files,
                (file_type,),
                compared_tokens=compared_tokens,
                on_status=on_status,
            )
            proofs = [f"{file.proof.sentence}." for file in written.files if file.proof]
            # Readers of the card have not trained the adapter themselves.
            proofs = [proof.replace("your adapter", "the adapter") for proof in proofs]
            compared = " ".join(proofs) or "The file was not compared with the trained model."
            return _Written(
                checked=(written.summary,),
                card=(compared, written.base.sentence, *written.notes),
                is_dequantized=written.base.chosen == "dequantized",
            )


def _remove_paths(files: Path, source: ChatSource) -> None:
    """Remove paths of this machine from the configs, and name the base without a path."""
    base = source.recipe.model.id
    name = base if find_files(base).source == "hub cache" else short_model_name(base)
    for path in filter(Path.is_file, (files / config for config in _CONFIGS)):
        before = json.loads(path.read_bytes())
        after = _without_paths(before)
        if _BASE in before:
            after[_BASE] = name
        if after != before:
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_paths(inner) for key, inner in value.items() if not key.endswith(_PATH_KEYS)}
