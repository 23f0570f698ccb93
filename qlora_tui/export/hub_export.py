"""``export hub``: adapter, merged model or GGUF file in a repository of the Hub, with a model card.

What can be checked is checked first. Then the repository is created, so that a missing permission is known
before minutes of work. The files stay on this machine until they are on the Hub: the same command then
continues with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from msgspec import Struct

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.catalog.hub import validate_model_id
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.chat.chat_types import ADAPTER, ChatSource
from qlora_tui.drafts import discard
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_file.content import base_license
from qlora_tui.export.hub_upload import NO_XET, Prepared, Uploaded
from qlora_tui.export.model_card import CardForm, CardResults, render_model_card, run_rows
from qlora_tui.export.upload_files import CARD, check_form, may_hold, upload_files
from qlora_tui.files import atomic_write
from qlora_tui.formatting import format_bytes
from qlora_tui.gpu.torch_env import online_environ
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import COMPARED_TOKENS
from qlora_tui.worker import run_job

StatusFn = Callable[[str], None]
T = TypeVar("T")


class HubExport(Struct, frozen=True, kw_only=True):
    """An uploaded repository."""

    url: str
    repo: str
    form: CardForm
    is_public: bool
    """Whether everybody can read it, as the Hub says."""
    files: tuple[str, ...]
    bytes: int
    commit: str
    stays_private: bool = False
    """Whether it is private although it was to be public."""
    checked: str = ""
    """How the files were compared with the trained model, in sentences; empty for an adapter, a copy."""
    effect: str = ""
    """What the adapter changes, in a sentence."""
    unmeasured_because: str = ""
    """Why that was not measured."""

    @property
    def summary(self) -> str:
        """Say what was uploaded and how it was checked, a sentence a line."""
        who = "public" if self.is_public else "private"
        lines = [f"Uploaded {len(self.files):,} files, {format_bytes(self.bytes)}; the repository is {who}."]
        if self.stays_private:
            lines.append("--public changes no existing repository: its settings page does.")
        lines += [self.checked, self.effect]
        if self.unmeasured_because:
            lines.append(f"What the adapter changes was not measured: {self.unmeasured_because}.")
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
        run: Whose events the card describes.
        source: The run's base and adapters.
        adapter_name: The adapter to upload or merge.
        repo: ``owner/name``, or ``name`` for the account of the token.
        form: What to upload.
        file_type: GGUF file type, or ``auto``.
        is_public: Whether everybody may read it.
        compared_tokens: Most tokens whose answers are compared.
        on_status: Called with the current activity.

    Raises:
        UserError: files already sent stay on the Hub, and are not sent again by the next call.
    """
    validate_model_id(repo)
    _require_token()
    check_form(source, adapter_name, form, file_type, on_status)
    from_hub = resolve_model(source.recipe.model.id).source == "hub cache"
    with upload_files(source, adapter_name, form, file_type) as folder:
        on_status(f"Creating {repo} on the Hub")
        base = source.recipe.model.id if from_hub else ""
        prepared = _run("prepare", repo, is_public, base, result=Prepared)
        # Before minutes of work; exactly once the names are known.
        _refuse_other_files(prepared, {name for name in prepared.files if may_hold(form, name)})
        facts = folder.write(source, adapter_name, form, file_type, on_status, compared_tokens)
        license_id = base_license(model_folder(source.recipe)) or prepared.base_license
        rows = run_rows(run)
        if adapter_name != ADAPTER:
            rows = (("Checkpoint", adapter_name.replace("-", " ")), *rows)
        results = CardResults(rows, facts.effect, "\n\n".join(filter(None, facts.card)), license_id)
        card = render_model_card(
            source.recipe,
            from_hub=from_hub,
            form=form,
            repo=prepared.repo,
            results=results,
            is_dequantized=facts.is_dequantized,
        )
        atomic_write(folder.files / CARD, card.encode())
        paths = [path for path in sorted(folder.files.rglob("*")) if path.is_file()]
        sizes = {path.relative_to(folder.files).as_posix(): path.stat().st_size for path in paths}
        _refuse_other_files(prepared, set(sizes))
        message = f"Upload the {form} form with qlora-tui"
        uploaded = _run("upload", prepared.repo, folder.files, message, result=Uploaded, on_status=on_status)
        with suppress(OSError):
            discard(folder.path)
    return HubExport(
        url=uploaded.url,
        repo=prepared.repo,
        form=form,
        is_public=prepared.is_public,
        stays_private=is_public and not prepared.is_public,
        files=tuple(sizes),
        bytes=sum(sizes.values()),
        commit=uploaded.commit,
        checked="\n".join(filter(None, facts.checked)),
        effect=facts.effect,
        unmeasured_because=facts.unmeasured_because,
    )


def _refuse_other_files(prepared: Prepared, names: set[str]) -> None:
    if unknown := sorted(set(prepared.files) - names):
        raise UserError(
            "The repository holds other files",
            what=f"{prepared.repo} has files that this upload does not: {', '.join(unknown[:5])}.",
            why="A repository with two forms of a model confuses the programs that load it.",
            fix="Choose another name, or delete those files on the Hub.",
        )


def _require_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "No Hugging Face token",
            what="There is no token on this machine, which uploads need.",
            fix="Create one that can write, then log in with: hf auth login",
        )


def _run(job: str, *arguments: object, result: type[T], on_status: StatusFn = lambda activity: None) -> T:
    return run_job(
        f"qlora_tui.export.hub_upload:{job}",
        *arguments,
        result=result,
        title="The upload ended early",
        subject="Its process",
        fix="Run the same command again: files already sent are not sent again.",
        on_progress=lambda message: on_status(message.text),
        shows_stderr=True,
        environ=NO_XET | online_environ(),
    )
