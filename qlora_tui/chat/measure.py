"""Measuring what an adapter does: both voices read the run's held-out conversations."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.base_weights import place
from qlora_tui.chat.effect import Effect, LayerChange
from qlora_tui.chat.session import ChatSession, model_folder
from qlora_tui.chat.terms import BASE
from qlora_tui.chat.updates import RowUpdate, Updates, read_updates
from qlora_tui.data.dataset import prepare
from qlora_tui.data.store import Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import EXIT_USAGE, UserError

_MOST_SAMPLES = 24
_MOST_TOKENS = 1024
"""Of one conversation; more of it says nothing else."""
_ROWS_AT_ONCE = 64
"""Vocabulary-wide rows compared at a time."""
_LAYER = re.compile(r"\.(\d+)\.")


def measure_effect(
    session: ChatSession,
    voice: str,
    *,
    tell: Callable[[str], None] = lambda words: None,
    stop: Event | None = None,
) -> Effect:
    """Compare ``voice`` with the base on the validation side of the run's data.

    ``stop`` ends it with the conversations compared so far. Raises UserError where there is nothing to
    compare.
    """
    if voice == BASE:
        raise UserError(
            "Nothing to compare",
            what="The base has no effect on itself.",
            fix="Choose an adapter.",
            exit_code=EXIT_USAGE,
        )
    session.need(voice)
    held_out = _held_out(session)
    chosen = _spread(len(held_out), _MOST_SAMPLES)
    sums = _Sums(session.end_ids)
    for number, i in enumerate(chosen, 1):
        if stop is not None and stop.is_set():
            break
        tell(f"Comparing on conversation {number} of {len(chosen)}")
        ids = list(held_out.token_ids(i)[:_MOST_TOKENS])
        trained = held_out.trained(i)[:_MOST_TOKENS]
        before = [t - 1 for t in range(1, len(ids)) if trained[t]]
        if before:
            session.check(BASE, ids)
            session.check(voice, ids)
            targets = torch.tensor([ids[t + 1] for t in before], device=session.device)
            sums.add(session.scores(BASE, ids, before), session.scores(voice, ids, before), targets)
    if not sums.tokens:
        raise UserError(
            "Nothing was compared",
            what="No held-out conversation was read to its answer.",
            fix="Try again, and let it finish.",
        )
    tell("Comparing the weights")
    updates = read_updates(Path(session.source.adapters[voice]))
    return Effect(
        voice=voice,
        samples=sums.samples,
        tokens=sums.tokens,
        mean_kl=sums.kl / sums.tokens,
        changed_choices=sums.changed / sums.tokens,
        base_loss=sums.base_loss / sums.tokens,
        adapter_loss=sums.adapter_loss / sums.tokens,
        turns=sums.turns,
        turns_ended=sums.turns_ended,
        turns_ended_by_base=sums.turns_ended_by_base,
        warning=session.warning,
        token_rows=_token_rows(session, updates),
        layers=_layer_changes(session, voice, updates),
    )


@dataclass
class _Sums:
    """Over all choices so far."""

    end_ids: frozenset[int]
    samples: int = 0
    tokens: int = 0
    kl: float = 0.0
    changed: int = 0
    base_loss: float = 0.0
    adapter_loss: float = 0.0
    turns: int = 0
    turns_ended: int = 0
    turns_ended_by_base: int = 0
    ends: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ends = torch.tensor(sorted(self.end_ids), dtype=torch.int64)

    def add(self, base: Tensor, adapter: Tensor, targets: Tensor) -> None:
        """One conversation: scores (choices, vocabulary) and the tokens that really came."""
        self.samples += 1
        self.tokens += len(targets)
        ends = self.ends.to(targets.device)
        for start in range(0, len(targets), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            came = targets[rows]
            q, p = base[rows].float().log_softmax(-1), adapter[rows].float().log_softmax(-1)
            self.kl += float(functional.kl_div(q, p, reduction="sum", log_target=True))
            self.base_loss += float(functional.nll_loss(q, came, reduction="sum"))
            self.adapter_loss += float(functional.nll_loss(p, came, reduction="sum"))
            base_says, adapter_says = q.argmax(-1), p.argmax(-1)
            self.changed += int((base_says != adapter_says).sum())
            at_end = torch.isin(came, ends)
            self.turns += int(at_end.sum())
            self.turns_ended += int((at_end & torch.isin(adapter_says, ends)).sum())
            self.turns_ended_by_base += int((at_end & torch.isin(base_says, ends)).sum())


def _held_out(session: ChatSession) -> Samples:
    recipe = session.source.recipe
    tokenizer = ChatTokenizer.from_folder(model_folder(recipe), recipe.model.chat_template)
    samples = prepare(recipe, tokenizer).validation
    if not len(samples):
        raise UserError(
            "No held-out conversations",
            what="This run held none of its data back for validation.",
            why="On what it was trained on, an adapter always looks good.",
            fix="Set data.validation_fraction or data.validation_path in the next run.",
        )
    return samples


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers, evenly spread."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def _token_rows(session: ChatSession, updates: Updates) -> tuple[str, ...]:
    rows = (update for update in updates.values() if isinstance(update, RowUpdate))
    ids = dict.fromkeys(i for update in rows for i in update.ids)
    return tuple(session.tokenizer.backend.id_to_token(i) or str(i) for i in ids)


def _layer_changes(session: ChatSession, voice: str, updates: Updates) -> tuple[LayerChange, ...]:
    """Against the 16-bit base as it is on the disk, one weight in memory at a time."""
    base = model_folder(session.source.recipe)
    adapter = Path(session.source.adapters[voice])
    files = [base / name for name in weight_files(base)]
    squares: dict[int, tuple[float, float]] = {}
    for file, placed in place(updates, files, adapter).items():
        with safe_open(file, framework="pt") as content:
            for name, update in placed.items():
                if (found := _LAYER.search(name)) is None:
                    continue
                layer = int(found[1])
                weight = content.get_tensor(name).float()
                change = update.applied_to(weight) - weight
                moved, held = squares.get(layer, (0.0, 0.0))
                squares[layer] = (moved + _square(change), held + _square(weight))
    return tuple(
        LayerChange(layer=layer, relative=(moved / held) ** 0.5 if held else 0.0)
        for layer, (moved, held) in sorted(squares.items())
    )


def _square(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight)) ** 2
