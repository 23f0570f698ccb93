"""Answers that the user chose or edited in the chat, as data to train on.

``choices/`` in the state directory has two files for each base model. Any recipe can name them as data:

* ``MODEL-HASH.pairs.jsonl``: a prompt with the better answer (``chosen``) and the other (``rejected``);
* ``MODEL-HASH.edits.jsonl``: a prompt with the answer as the user edited it (``completion``), the only part
  in the loss.

The hash distinguishes models whose folders have the same name.

Each row has its provenance: base, adapters, run, decoding settings, time. A new judgment of a turn replaces
its row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui import paths
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import atomic_write, private_dir, read_regular
from qlora_tui.formatting import format_bytes
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.recipe.schema import Recipe, Source

ChoiceKind: TypeAlias = Literal["pairs", "edits"]
ENOUGH = 20
"""Minimum number of rows for the app to offer training on them."""
_MAX_BYTES = 1 << 28
_PAIR_LEARNING_RATE = 1e-4
"""Maximum learning rate for a run on pairs. A higher rate soon makes both answers unlikely."""
_PAIR_EPOCHS = 3.0
"""Epochs of a run on pairs. With one packed sequence per step, 25 pairs give about 27 steps."""


class Provenance(Struct, frozen=True, kw_only=True):
    """Origin of a row."""

    id: str
    """Id that all judgments of one turn of a conversation share."""
    at: float
    """Unix time of the judgment."""
    base: str
    """The base model, as named in the recipe."""
    run: str
    """Id of the run whose adapter answered; empty for a base alone."""
    answers: dict[str, str]
    """Adapter name of each answer, by its role: ``chosen`` and ``rejected``, or ``edited``."""
    sampling: dict[str, Any]
    """Decoding settings of the answers."""
    original: str = ""
    """The answer before the user edited it."""


def choices_path(base: str, kind: ChoiceKind) -> Path:
    """Return the file of a base model's rows, named after its Hub id or folder. It may not exist yet."""
    name = str(Path(base).resolve()) if Path(base).is_absolute() else base.rstrip("/")
    identity = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
    return paths.state_dir() / "choices" / f"{_name(base)}-{identity}.{kind}.jsonl"


def _name(base: str) -> str:
    return re.sub(r"[^\w.-]+", "-", base.rstrip("/").rpartition("/")[2])[:64] or "model"


def add_choice(
    kind: ChoiceKind, prompt: Sequence[Message], answers: dict[str, str], provenance: Provenance
) -> int:
    """Record a judgment of answers to a prompt, and return the number of rows of this kind and base.

    Args:
        kind: Determines the file.
        prompt: The turns before the answer.
        answers: ``chosen`` and ``rejected`` for a pair; ``completion`` for an edit.
        provenance: Origin of the answers.

    Raises:
        UserError: The file cannot be written.
    """
    row: dict[str, Any] = {"prompt": _turns(prompt)}
    row |= {part: _turns([Message("assistant", answer)]) for part, answer in answers.items()}
    row["provenance"] = msgspec.to_builtins(provenance)
    return _put(provenance.base, kind, row, provenance.id)


def count_choices(base: str, kind: ChoiceKind) -> int:
    """Return the number of rows of this kind for a base model; 0 if the file cannot be read."""
    try:
        return len(_lines(choices_path(base, kind)))
    except OSError:
        return 0


def recipe_on_choices(recipe: Recipe, kind: ChoiceKind, run_id: str) -> Recipe:
    """Return the recipe of a run that trains an adapter further, with only the user's choices as data.

    Args:
        recipe: Recipe of the run that the user chatted with.
        kind: Pairs are trained with DPO, edits with the usual loss.
        run_id: Id of that run; empty to start with a new adapter.
    """
    path = choices_path(recipe.model.id, kind)
    # The earlier run may have trained on preferences, but edits are no preferences.
    data = replace(recipe.data, sources=(Source(path=str(path)),), validation_path="", preferences="refuse")
    training = replace(recipe.training, max_steps=0)
    lora = replace(recipe.lora, init_from=run_id)
    if kind == "pairs":
        # Replace settings that conflict with a preference method or do not suit few rows.
        data = replace(data, preferences="dpo", train_on="assistant", overflow="cut-right")
        training = replace(
            training,
            replay_share=0.0,
            neftune_alpha=0.0,
            learning_rate=min(training.learning_rate, _PAIR_LEARNING_RATE),
            gradient_accumulation=1,
            epochs=_PAIR_EPOCHS,
        )
    return replace(
        recipe,
        name=f"{_name(recipe.model.id).partition('.')[0]}-{kind}",
        data=data,
        lora=lora,
        training=training,
    )


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _lines(path: Path) -> list[bytes]:
    """Return the lines of a file. Raises OSError."""
    return [line for line in read_regular(path, _MAX_BYTES).splitlines() if line.strip()]


@disk_problems()
def _put(base: str, kind: ChoiceKind, row: dict[str, Any], turn_id: str) -> int:
    """Append a row, or replace the earlier row of the same turn; return the number of rows."""
    path = choices_path(base, kind)
    private_dir(path.parent)
    with locked(path.with_suffix(".lock"), patience_s=10 * PATIENCE_S) as lock:
        if lock is None:
            raise UserError(
                "The choice was not saved",
                what=f"Another program is writing to {path}.",
                fix="Try again in a moment.",
            )
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            raise UserError(
                "The choice was not saved",
                what=f"{path} is larger than {format_bytes(_MAX_BYTES)}.",
                why="Saving rewrites the file, and would lose everything beyond that size.",
                fix="Move the file away: the next choice starts a new file.",
            )
        lines = _lines(path) if path.exists() else []
        lines = [line for line in lines if _provenance(line).get("id") != turn_id]
        lines.append(msgspec.json.encode(row))
        atomic_write(path, b"\n".join(lines) + b"\n", durable=True)
    return len(lines)


def _provenance(line: bytes) -> dict[str, Any]:
    """Return the provenance of a row; empty for a row that another program wrote."""
    try:
        provenance = msgspec.json.decode(line)["provenance"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        return {}
    return provenance if isinstance(provenance, dict) else {}
