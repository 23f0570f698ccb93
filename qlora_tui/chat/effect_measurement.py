"""Measurement of an adapter's effect: base and adapter score the validation conversations of the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from qlora_tui.adapters.base_weights import PlacedDeltas, model_folder, placed_updates
from qlora_tui.adapters.deltas import EmbeddingRowDelta
from qlora_tui.chat.chat_types import BASE, Effect, LayerChange
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.dataset import PreparedDataset, prepare_dataset
from qlora_tui.data.store import GOOD, Samples
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import EXIT_USAGE, UserError

_MAX_SAMPLES = 24
_MAX_TOKENS = 1024
"""Maximum number of tokens to use from one conversation; tokens beyond it add no information."""
_ROWS_AT_ONCE = 64
"""Number of vocabulary-wide rows compared at a time."""
_LAYER = re.compile(r"\.(\d+)\.")


def measure_effect(
    session: ChatSession,
    adapter_name: str,
    *,
    on_status: Callable[[str], None] = lambda words: None,
    stop: Event | None = None,
) -> Effect:
    """Compare ``adapter_name`` with the base on the validation split of the run's data.

    Setting ``stop`` ends the comparison early, with the conversations done so far. Raises UserError if there
    is nothing to compare.
    """
    if adapter_name == BASE:
        raise UserError(
            "Nothing to compare",
            what="The base model has no adapter to compare.",
            fix="Choose an adapter.",
            exit_code=EXIT_USAGE,
        )
    session.ensure_loaded(adapter_name)
    validation = validation_samples(session_data(session)).spread(_MAX_SAMPLES)
    sums = _EffectSums(session.end_ids)
    for i in range(len(validation)):
        if stop is not None and stop.is_set():
            break
        on_status(f"Comparing on conversation {i + 1} of {len(validation)}")
        ids = list(validation.token_ids(i)[:_MAX_TOKENS])
        trained = validation.loss_mask(i)[:_MAX_TOKENS]
        before = [t - 1 for t in range(1, len(ids)) if trained[t]]
        if before:
            session.check(BASE, ids)
            session.check(adapter_name, ids)
            targets = torch.tensor([ids[t + 1] for t in before], device=session.device)
            sums.add(
                session.logits_at(BASE, ids, before), session.logits_at(adapter_name, ids, before), targets
            )
    if not sums.tokens:
        raise UserError(
            "Nothing was compared",
            what="The measurement ended before a validation conversation was compared.",
            fix="Try again and let it finish.",
        )
    on_status("Comparing the weights")
    updates = placed_updates(session.source.recipe, Path(session.source.adapters[adapter_name]))
    every = (update for placed in updates.values() for update in placed.values())
    rows = (update.ids for update in every if isinstance(update, EmbeddingRowDelta))
    trained_rows = dict.fromkeys(i for ids in rows for i in ids)
    return Effect(
        adapter_name=adapter_name,
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
        token_rows=tuple(session.tokenizer.backend.id_to_token(i) or str(i) for i in trained_rows),
        layers=_layer_changes(updates),
    )


@dataclass
class _EffectSums:
    """Sums over all choices so far."""

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
        """Add one conversation: both models' logits (positions, vocabulary) and the targets (positions,)."""
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
            base_choice, adapter_choice = q.argmax(-1), p.argmax(-1)
            self.changed += int((base_choice != adapter_choice).sum())
            at_end = torch.isin(came, ends)
            self.turns += int(at_end.sum())
            self.turns_ended += int((at_end & torch.isin(adapter_choice, ends)).sum())
            self.turns_ended_by_base += int((at_end & torch.isin(base_choice, ends)).sum())


def session_data(session: ChatSession) -> PreparedDataset:
    """Return the prepared data of the session's recipe. Raises UserError if the data cannot be read."""
    recipe = session.source.recipe
    return prepare_dataset(
        recipe, ChatTokenizer.from_folder(model_folder(recipe), recipe.model.chat_template)
    )


def validation_samples(data: PreparedDataset) -> Samples:
    """Return the validation samples. For preference data, these are only the samples with good answers.

    Raises UserError if there are none.
    """
    samples = data.validation.of_side(GOOD)
    if not len(samples):
        raise UserError(
            "No validation conversations",
            what="This run has no validation data.",
            why="An adapter always looks good on its own training data.",
            fix="Set data.validation_fraction or data.validation_path in the next run.",
        )
    return samples


def _layer_changes(updates: Mapping[Path, PlacedDeltas]) -> tuple[LayerChange, ...]:
    """Return the change of each layer relative to the 16-bit base, reading one weight at a time."""
    squares: dict[int, tuple[float, float]] = {}
    for file, placed in updates.items():
        with safe_open(file, framework="pt") as content:
            for name, update in placed.items():
                if (match := _LAYER.search(name)) is None:
                    continue
                layer = int(match[1])
                weight = content.get_tensor(name).float()
                change = update.apply_to(weight) - weight
                delta_square, base_square = squares.get(layer, (0.0, 0.0))
                squares[layer] = (delta_square + _square(change), base_square + _square(weight))
    return tuple(
        LayerChange(layer=layer, relative=(delta_square / base_square) ** 0.5 if base_square else 0.0)
        for layer, (delta_square, base_square) in sorted(squares.items())
    )


def _square(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight)) ** 2
