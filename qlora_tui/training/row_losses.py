"""Measures the loss of each trained token of each training sample, before and after a run.

This is a job that :mod:`qlora_tui.runs.row_losses` starts. It loads the run's base with its final adapter,
and passes over the training samples three times without gradients: with the base alone, with the adapter, and
with the adapter on answers after other prompts (:class:`OtherPrompts`). It writes the files of that module.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_tui.data.step_plan import TokenizedDataset
from qlora_tui.gpu.torch_env import faster_imports
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import measuring
from qlora_tui.training.samples import Sample, SampleList
from qlora_tui.worker import Report

if TYPE_CHECKING:
    from qlora_tui.data.tokenizer import ChatTokenizer


class OtherPrompts(Sequence[Sample]):
    """Samples in which each answer follows a prompt of another sample, built one at a time.

    A prompt is a stretch of tokens outside the loss. Its answer is the next stretch, which is in the loss.
    The first prompt, with system text and template, comes from the next sample. Later prompts come from the
    next sample with several turns. If no other sample has several turns, they come from another turn of the
    same sample, and a sample with exactly two turns keeps its second prompt::

        sample 0   system, user a, [answer a], user b, [answer b]
        sample 1   system, user c, [answer c], user d, [answer d]
        gives      system, user c, [answer a], user d, [answer b]
    """

    def __init__(self, samples: TokenizedDataset, max_length: int) -> None:
        """Read turns from ``samples``.

        A result longer than ``max_length`` tokens loses the beginning of its first prompt.
        """
        self._samples = samples
        self._max_length = max_length
        self._turns = [_turn_bounds(samples.loss_mask(i)) for i in range(len(samples))]
        self._with_several = [i for i, turns in enumerate(self._turns) if len(turns) > 1]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: Any) -> Any:
        ids, mask = self._swapped(i)
        return Sample(ids, mask)

    def _swapped(self, i: int) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of a sample with other prompts."""
        own = list(self._samples.token_ids(i))
        ids: list[int] = []
        mask: list[int] = []
        for number, turn in enumerate(self._turns[i]):
            prompt, answer = self._other_prompt(i, number), own[turn.answer_start : turn.end]
            ids += [*prompt, *answer]
            mask += [0] * len(prompt) + [1] * len(answer)
        first = mask.index(1) if 1 in mask else 0
        cut = min(first, max(0, len(ids) - self._max_length))
        return ids[cut:][: self._max_length], mask[cut:][: self._max_length]

    def _other_prompt(self, i: int, number: int) -> list[int]:
        """Return the tokens of the prompt that replaces prompt ``number`` of sample ``i``."""
        if number == 0:
            other = (i + 1) % len(self)
            turns = self._turns[other]
            end = turns[0].answer_start if turns else self._samples.length(other)
            return list(self._samples.token_ids(other))[:end]
        donors = self._with_several
        other = donors[bisect_right(donors, i) % len(donors)]
        turns = self._turns[other]
        later = len(turns) - 1
        # If the other sample is the same one, take its next prompt.
        turn = turns[1 + (number - (other != i)) % later]
        return list(self._samples.token_ids(other))[turn.start : turn.answer_start]


class _TurnBounds(NamedTuple):
    """Positions of a prompt and its answer in a sample."""

    start: int
    answer_start: int
    end: int


def _turn_bounds(loss_mask: Sequence[int]) -> list[_TurnBounds]:
    """Return the bounds of each prompt with its answer. Tokens after the last answer are left out."""
    bounds: list[_TurnBounds] = []
    start, place = 0, 0
    for in_loss, stretch in groupby(loss_mask, key=bool):
        length = len(list(stretch))
        if in_loss:
            bounds.append(_TurnBounds(start, place, place + length))
            start = place + length
        place += length
    return bounds


def measure(folder: Path, report: Report) -> None:
    """Measure all training rows of the run in a folder, and write the result.

    Raises:
        UserError: the run has no adapter, is in use, or its data or model cannot be read.
        OSError: the result cannot be written.
    """
    with measuring(folder) as run:
        _measure(run, report)


def _measure(run: RunDir, report: Report) -> None:
    with faster_imports():
        from qlora_tui.catalog.local_models import resolve_model
        from qlora_tui.data.dataset import prepare_dataset
        from qlora_tui.data.repetition import find_contradictions
        from qlora_tui.data.store import GOOD
        from qlora_tui.data.tokenizer import ChatTokenizer
        from qlora_tui.data.trainable_tokens import token_ids
        from qlora_tui.runs.row_losses import MeasuredRow, classify, write_row_losses
        from qlora_tui.training.adapter import add_lora, load_adapter
        from qlora_tui.training.batches import RowShape
        from qlora_tui.training.compute_device import choose_attention, find_device
        from qlora_tui.training.gguf_conversion import model_folder
        from qlora_tui.training.host import lower_priority
        from qlora_tui.training.model import prepare_base
        from qlora_tui.training.scoring import token_losses

    started = time.monotonic()
    recipe = run.recipe()
    device = find_device(recipe)
    if device.kind == "cpu":
        lower_priority()
    files = resolve_model(recipe.model.id)
    folder = model_folder(files)
    tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
    # For a preference run, measure the good answers, which the run should learn.
    samples = prepare_dataset(recipe, tokenizer).train.of_side(GOOD)
    base = prepare_base(folder, recipe, device, choose_attention(recipe, device), "chunked", weighted=False)
    ids = token_ids(recipe.lora.trainable_tokens, tokenizer)
    model = add_lora(base.model, recipe.lora, files.architecture, ids)
    load_adapter(model, run.adapter_dir)
    shape = RowShape(
        packed=base.padding_free,
        max_length=recipe.data.max_length,
        multiple=device.row_multiple,
        pad_id=tokenizer.pad_id or 0,
    )
    where = device.torch_device

    def losses(dataset: Any, passes_done: int) -> list[tuple[float, ...]]:
        return token_losses(
            model,
            dataset,
            shape,
            where,
            lambda done, total: report(passes_done * total + done, 3 * total),
        )

    with model.disable_adapter():
        before = losses(samples, 0)
    after = losses(samples, 1)
    others = losses(SampleList(OtherPrompts(samples, recipe.data.max_length)), 2)
    contradicts = find_contradictions([_texts(samples, i, tokenizer) for i in range(len(samples))])
    measured = [
        MeasuredRow(
            source=samples.origin(i)[0],
            row=samples.origin(i)[1],
            file=samples.file_name(i),
            before=before[i],
            after=after[i],
            other_prompt=sum(others[i]) / max(1, len(others[i])),
            contradicts=samples.origin(contradicts[i])[1] if i in contradicts else None,
            contradicts_file=samples.file_name(contradicts[i]) if i in contradicts else "",
        )
        for i in range(len(samples))
        if after[i]
    ]
    write_row_losses(run, *classify(run.id, measured, time.monotonic() - started))


def _texts(samples: TokenizedDataset, i: int, tokenizer: ChatTokenizer) -> tuple[str, str]:
    """Return (text outside the loss, text in the loss) of sample ``i``, without special tokens."""
    ids = list(zip(samples.token_ids(i), samples.loss_mask(i), strict=True))
    read, trained = (
        tokenizer.decode([t for t, in_loss in ids if in_loss == side and t not in tokenizer.special_ids])
        for side in (0, 1)
    )
    return read, trained
