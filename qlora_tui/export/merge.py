"""The adapter merged into its base: an ordinary model folder that any program loads.

The base's weight files are copied, and the weights that the adapter changes are then modified in the copy,
one at a time: this takes the memory of one weight, not of the model. Where ``base_choice`` finds that the
adapter answers nearer to its training on the weights it was trained on, every weight that training quantizes
is rounded to 4 bits and back first; the merged model is stored in 16 bits either way.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msgspec import Struct

from qlora_tui.adapters.merged_weights import merged_weights
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import (
    copy_files,
    is_template_file,
    tokenizer_files,
)
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer_files import own_templates, read_json_object
from qlora_tui.errors import UserError
from qlora_tui.export.base_choice import BaseChoice, BaseName, base_requantizer, choice_named
from qlora_tui.export.merge_check import MergeCheck, verify_merge
from qlora_tui.export.model_card import render_model_card
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing, require_space
from qlora_tui.formatting import capitalize
from qlora_tui.runs.exports import COMPARED_TOKENS

_SPARE_BYTES = 64 << 20
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


class MergeResult(Struct, frozen=True, kw_only=True):
    """Result of a merge."""

    folder: str
    bytes: int
    changed_weights: int
    """Number of weight matrices that the adapter changed."""
    base: BaseChoice
    """The base weights it was merged into."""
    check: MergeCheck | None = None
    """Comparison with the logits of base and adapter; None if they were not compared."""
    unchecked_because: str = ""
    """Why they were not compared."""

    @property
    def command(self) -> str:
        """Return the command that serves it."""
        return f"vllm serve {shlex.quote(self.folder)}"

    @property
    def check_sentence(self) -> str:
        """Say how base and adapter compare, or why they were not compared."""
        return f"Checked: {self.check.sentence}." if self.check else f"Not checked: {self.unchecked_because}."


def merge(
    source: ChatSource,
    adapter_name: str,
    out: Path,
    on_status: Callable[[str], None] = lambda words: None,
    *,
    base_name: BaseName = "best",
    compared_tokens: int = COMPARED_TOKENS,
) -> MergeResult:
    """Write the base with an adapter merged into it, and compare it with both before it gets its name.

    Args:
        source: The base and its adapters, from :mod:`qlora_tui.chat.chat_sources`.
        adapter_name: The adapter to merge.
        out: The folder to write, which must not exist yet.
        on_status: Called with the current activity.
        base_name: The base weights to merge into; ``best`` measures which answers are nearer to the training.
        compared_tokens: Most tokens whose answers are compared for that.

    Raises:
        UserError: also where the merged model does not answer like the adapter; nothing is left behind.
    """
    out = out.expanduser().absolute()
    refuse_existing(out)
    adapter = Path(source.adapters[adapter_name])
    weights = merged_weights(source.recipe, adapter, on_status)
    base, files = weights.folder, list(weights.updates)
    needed = sum(file.stat().st_size for file in files) + _SPARE_BYTES
    require_space(out.parent, needed, "The merged model")
    with draft_folder(out) as draft:
        folder = draft / "model"
        folder.mkdir(mode=0o755)
        choice = choice_named(base_name, source, adapter_name, on_status, compared_tokens)
        weights = replace(weights, requantize=base_requantizer(source, choice))
        for number, file in enumerate(files, 1):
            on_status(f"Merging {file.name} ({number} of {len(files)})")
            weights.write(file, folder / file.name)
        copy_files(base, folder, [name for name in _MODEL_FILES if (base / name).is_file()])
        _copy_tokenizer(base, adapter, folder)
        (folder / "README.md").write_text(
            render_model_card(
                source.recipe,
                from_hub=_from_hub(source),
                is_dequantized=choice.chosen == "dequantized",
            ),
            encoding="utf-8",
        )
        check = verify_merge(source, adapter_name, folder, on_status, weights.requantize)
        if not isinstance(check, str) and not check.agrees:
            raise UserError(
                "The merged model does not answer like the adapter",
                what=f"{capitalize(check.sentence)}. It was not kept.",
                why="The base stores its weights in an unknown layout, or its files are damaged.",
                fix="Use the adapter instead, and report the model.",
            )
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        publish_new(folder, out)
    return MergeResult(
        folder=str(out),
        bytes=size,
        changed_weights=weights.changed,
        base=choice,
        check=None if isinstance(check, str) else check,
        unchecked_because=check if isinstance(check, str) else "",
    )


def _copy_tokenizer(base: Path, adapter: Path, folder: Path) -> None:
    """Copy the adapter's tokenizer over the base's; its chat templates replace all of the base's."""
    names = tokenizer_files(base)
    if any(own_templates(adapter, read_json_object(adapter / "tokenizer_config.json"))):
        names = [name for name in names if not is_template_file(name)]
    copy_files(base, folder, names)
    copy_files(adapter, folder, tokenizer_files(adapter))


def _from_hub(source: ChatSource) -> bool:
    return resolve_model(source.recipe.model.id).source == "hub cache"
