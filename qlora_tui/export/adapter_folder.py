"""``export adapter``: a run's adapter in peft's format, within the limits of vLLM.

The limits are in vLLM's ``PEFTHelper`` (vllm/lora/peft_helper.py), which also reads a single rank and alpha
for all modules and ignores ``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path, PurePath

from msgspec import Struct

from qlora_tui.adapters.deltas import ROWS, check_unchanged
from qlora_tui.catalog.adapters import CONFIG, WEIGHTS, load_adapter_config
from qlora_tui.catalog.local_models import load_model_config, resolve_model
from qlora_tui.catalog.model_validation import MXFP4, copy_files, tokenizer_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UserError
from qlora_tui.export.unfinished_files import draft_folder, publish_new, refuse_existing
from qlora_tui.files import size_of
from qlora_tui.training.adapter import MISREAD_REMEDY, misread_by_peft

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Possible values of vLLM's ``--max-lora-rank``."""
_DEFAULT_RANK = 16
_MERGE_MEASURES = (
    " `qlora-tui export merge` measures the difference, and merges the adapter into the closer weights."
)


class AdapterFolder(Struct, frozen=True, kw_only=True):
    """A written adapter folder."""

    path: str
    bytes: int
    rank: int
    command: str
    """Command that serves the adapter with vLLM."""
    notes: tuple[str, ...] = ()
    """Anything unusual about the adapter, in sentences."""

    @property
    def summary(self) -> str:
        """Rank of the adapter and the notes, with a line for each sentence."""
        return "\n".join((f"Rank {self.rank}.", *self.notes))


def export_adapter_folder(source: ChatSource, adapter_name: str, out: Path) -> AdapterFolder:
    """Copy an adapter that vLLM can serve. Raises UserError, after which ``out`` is unchanged."""
    refuse_existing(out)
    adapter = Path(source.adapters[adapter_name])
    check_unchanged(adapter)
    rank = _served_rank(adapter)
    with draft_folder(out) as draft:
        folder = draft / "adapter"
        folder.mkdir(mode=0o755)
        others = (CONFIG, WEIGHTS, "README.md", "generation_config.json")
        names = [name for name in others if (adapter / name).is_file()]
        copy_files(adapter, folder, [*names, *tokenizer_files(adapter)])
        size = size_of(folder)
        publish_new(folder, out)
    flag = f" --max-lora-rank {rank}" if rank > _DEFAULT_RANK else ""
    base, module = shlex.quote(source.recipe.model.id), shlex.quote(_module(out))
    command = f"vllm serve {base} --enable-lora --lora-modules {module}{flag}"
    return AdapterFolder(path=str(out), bytes=size, rank=rank, command=command, notes=_notes(source, adapter))


def _module(folder: Path) -> str:
    """Return a folder as a value of vLLM's ``--lora-modules``.

    In the form ``name=path``, neither part may contain a comma or another ``=``: ``LoRAParserAction`` in
    vllm/entrypoints/openai/cli_args.py, commit 005223338608.
    """
    if any(mark in str(folder) for mark in ",="):
        return json.dumps({"name": folder.name, "path": str(folder)})
    return f"{folder.name}={folder}"


def _notes(source: ChatSource, adapter: Path) -> tuple[str, ...]:
    recipe, notes = source.recipe, []
    if PurePath(recipe.model.id).is_absolute() and not Path(recipe.model.id).exists():
        notes.append(f"The base {recipe.model.id} is missing: name its folder in the command.")
    if recipe.quantization.method in ("nf4", "fp4"):
        stored, remedy = ("MXFP4", "") if _is_mxfp4(recipe.model.id) else ("16-bit", _MERGE_MEASURES)
        notes.append(
            f"The command serves the adapter on the stored {stored} base, but the adapter was trained on "
            f"{recipe.quantization.method.upper()} weights, so its answers may differ.{remedy}"
        )
    if misread := _misread(recipe.model.id, adapter):
        notes.append(f"Plain peft mistakes {misread[0]} for a routed expert. {MISREAD_REMEDY}")
    return tuple(notes)


def _misread(model_id: str, adapter: Path) -> list[str]:
    """Return the adapter's targets that plain peft misreads; empty if the base is not on this machine."""
    try:
        model_type = load_model_config(model_id).get("model_type")
        return misread_by_peft(str(model_type), load_adapter_config(adapter)["target_modules"])
    except UserError:
        return []


def _is_mxfp4(model_id: str) -> bool:
    """Return whether the base stores experts in MXFP4; False also if the base is not on this machine."""
    try:
        return resolve_model(model_id).architecture.quantized_as == MXFP4
    except UserError:
        return False


def _served_rank(adapter: Path) -> int:
    """Return the value of ``--max-lora-rank`` for an adapter. Raises UserError if vLLM cannot serve it."""
    from safetensors import safe_open

    config = load_adapter_config(adapter)
    with safe_open(adapter / WEIGHTS, framework="pt") as weights:
        keys = list(weights.keys())
        ranks = {weights.get_slice(key).get_shape()[0] for key in keys if key.endswith(".lora_A.weight")}
    reasons = {
        "it is a DoRA adapter": config.get("use_dora"),
        "it changes routed experts": config.get("target_parameters"),
        "it has trained token rows": any(map(ROWS.fullmatch, keys)),
        "it contains whole modules": config.get("modules_to_save"),
        "it has biases": config.get("bias", "none") != "none",
        "its modules have different ranks or alphas": config.get("alpha_pattern")
        or ranks != {config.get("r", 8)},
        f"its rank is above {_RANKS[-1]}": max(ranks, default=0) > _RANKS[-1],
    }
    why = next((reason for reason, applies in reasons.items() if applies), None)
    if why is not None:
        raise UserError(
            "vLLM cannot serve this adapter",
            what=f"vLLM does not support this adapter: {why}.",
            fix="Export the merged model instead: `qlora-tui export merge`. vLLM can serve the merged model.",
        )
    return next(rank for rank in _RANKS if rank >= max(ranks))
