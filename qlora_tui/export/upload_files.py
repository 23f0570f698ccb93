"""The files of an upload to the Hub, written to ``uploads/`` of the cache and kept there until they are sent.

Nothing in it names a path of this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from qlora_tui import __version__, paths
from qlora_tui.adapters.deltas import check_unchanged
from qlora_tui.adapters.merged_weights import merged_weights
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS
from qlora_tui.catalog.gguf import AUTO, LADDER, estimated_bytes
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import copy_files, is_tokenizer_file, tokenizer_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.effect_measurement import measure_effect
from qlora_tui.chat.session import chat_tokenizer, load_session
from qlora_tui.decoding import decode_json
from qlora_tui.drafts import discard, publish
from qlora_tui.errors import UserError
from qlora_tui.export.gguf_export import export_gguf
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_plan import check_file_types
from qlora_tui.export.merge import merge
from qlora_tui.export.model_card import CardForm
from qlora_tui.export.unfinished_files import draft_folder, require_space
from qlora_tui.formatting import short_model_name

UPLOADS = "uploads"
"""Folder of the cache."""
CARD = "README.md"
_FACTS = "facts.json"
_FILES = "files"
_ADAPTER_FILES = (WEIGHTS, CONFIG, "generation_config.json")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", CONFIG)
_BASE = "base_model_name_or_path"
_PATH_KEYS = ("name_or_path", "_file")
"""Ends of keys in which transformers notes where a model or tokenizer was read from; nothing reads them."""

StatusFn = Callable[[str], None]


class UploadFacts(Struct, frozen=True):
    """What was found out while the files were written."""

    checked: tuple[str, ...] = ()
    """How the files were compared with the trained model, in sentences for whoever exports."""
    card: tuple[str, ...] = ()
    """The same for readers of the model card."""
    effect: str = ""
    """What the adapter changes, in a sentence."""
    unmeasured_because: str = ""
    """Why that was not measured."""
    is_dequantized: bool = False
    """Whether the base weights that the adapter was merged into are those of the training, dequantized."""


_FACTS_DECODER = msgspec.json.Decoder(UploadFacts)


def check_form(
    source: ChatSource, adapter_name: str, form: CardForm, file_type: str, on_status: StatusFn
) -> None:
    """Raise UserError for what cannot be written, as far as that is known before anything is computed."""
    if form == "adapter":
        check_unchanged(Path(source.adapters[adapter_name]))
        return
    kinds = LADDER if file_type == AUTO else (file_type,)
    if form == "gguf":
        check_file_types(kinds, file_type == AUTO)
    weights = merged_weights(source.recipe, Path(source.adapters[adapter_name]), on_status)
    if form == "gguf":
        gguf_content(source, chat_tokenizer(source, weights.folder), weights)
    architecture = resolve_model(source.recipe.model.id).architecture
    needed = estimated_bytes(architecture, kinds[0]) if form == "gguf" else 2 * architecture.total_params
    require_space(paths.cache_dir(), needed, "The upload")


def may_hold(form: CardForm, name: str) -> bool:
    """Return whether an upload of this form may hold a file of this name."""
    if name == CARD:
        return True
    match form:
        case "adapter":
            return name in _ADAPTER_FILES or is_tokenizer_file(name)
        case "merged":
            return not name.endswith(".gguf") and name not in (WEIGHTS, CONFIG)
        case "gguf":
            return name.endswith(".gguf")


@contextmanager
def upload_files(
    source: ChatSource, adapter_name: str, form: CardForm, file_type: str
) -> Iterator[UploadFolder]:
    """Hold the folder of an upload for this process; it may have the files of an earlier try.

    Raises UserError where another process uploads the same.
    """
    folder = paths.cache_dir() / UPLOADS / _key(source, adapter_name, form, file_type)
    with draft_folder(folder) as draft:
        yield UploadFolder(folder, draft)


@dataclass(frozen=True)
class UploadFolder:
    """The files of one upload and what is known of them."""

    path: Path
    draft: Path
    """Where they are written first."""

    @property
    def files(self) -> Path:
        """Return the folder whose files are sent."""
        return self.path / _FILES

    def write(
        self,
        source: ChatSource,
        adapter_name: str,
        form: CardForm,
        file_type: str,
        on_status: StatusFn,
        compared_tokens: int,
    ) -> UploadFacts:
        """Write everything but the model card, unless an earlier try has. Raises UserError."""
        if not (self.path / _FACTS).is_file():
            if self.path.exists():
                discard(self.path)
            files = self.draft / _FILES
            facts = _write(files, source, adapter_name, form, file_type, on_status, compared_tokens)
            (self.draft / _FACTS).write_bytes(msgspec.json.encode(facts))
            publish(self.draft, self.path)
        return decode_json((self.path / _FACTS).read_bytes(), _FACTS_DECODER)


def _key(source: ChatSource, adapter_name: str, form: CardForm, file_type: str) -> str:
    """Return the name of the folder of an upload: another adapter or form has another."""
    hashed = hashlib.sha256()
    adapter = Path(source.adapters[adapter_name])
    with (adapter / WEIGHTS).open("rb") as weights:
        hashed.update(hashlib.file_digest(weights, "sha256").digest())
    recipe = msgspec.json.encode(source.recipe).decode()
    hashed.update(json.dumps([form, file_type, recipe, __version__]).encode())
    return hashed.hexdigest()[:16]


def _write(
    files: Path,
    source: ChatSource,
    adapter_name: str,
    form: CardForm,
    file_type: str,
    on_status: StatusFn,
    compared_tokens: int,
) -> UploadFacts:
    checked: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    is_dequantized = False
    match form:
        case "adapter":
            files.mkdir()
            _copy_adapter(Path(source.adapters[adapter_name]), files)
        case "merged":
            merged = merge(source, adapter_name, files, on_status, compared_tokens=compared_tokens)
            is_dequantized = merged.base.chosen == "dequantized"
            checked = (merged.check_sentence, merged.base.sentence)
            compared = merged.check_sentence if merged.check else "It was not compared with base and adapter."
            card = (compared, merged.base.sentence)
        case "gguf":
            written = export_gguf(
                source,
                adapter_name,
                files,
                (file_type,),
                compared_tokens=compared_tokens,
                on_status=on_status,
            )
            is_dequantized = written.base.chosen == "dequantized"
            checked = (written.summary,)
            proofs = [f"{file.proof.sentence}." for file in written.files if file.proof]
            # Whoever reads the card has not trained the adapter.
            proofs = [proof.replace("your adapter", "the adapter") for proof in proofs]
            compared = " ".join(proofs) or "The file was not compared with the trained model."
            card = (compared, written.base.sentence, *written.notes)
    _remove_paths(files, source)
    effect, unmeasured = "", ""
    try:
        effect = measure_effect(load_session(source, on_status), adapter_name, on_status=on_status).sentence
    except UserError as problem:
        # Such as without the run's data, or without memory for the model.
        unmeasured = f"{problem.title}: {problem.what}".rstrip(".")
    return UploadFacts(checked, card, effect, unmeasured, is_dequantized)


def _copy_adapter(adapter: Path, files: Path) -> None:
    """Copy what loads the adapter, without the recipe and other files of the run."""
    check_unchanged(adapter)
    names = [name for name in _ADAPTER_FILES if (adapter / name).is_file()]
    copy_files(adapter, files, [*names, *tokenizer_files(adapter)])


def _remove_paths(files: Path, source: ChatSource) -> None:
    """Rewrite the configs without paths of this machine, and name the base without one."""
    base = source.recipe.model.id
    name = base if resolve_model(base).source == "hub cache" else short_model_name(base)
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
