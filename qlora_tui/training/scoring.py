"""Scores tokens with a model without training it: losses of samples, and logits at answers.

If a run isolates packed samples, prompts with answers are packed end to end into rows, as its training
samples are. Where oneDNN computes the matrix products (bfloat16 on a CPU), these rows all have the same
length, so that its kernels are created only once. If answers were computed one at a time, each length would
need about 25 kernels, and creating them takes longer than computing the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_tui.data.step_plan import PackedSamples, TokenizedDataset, pack
from qlora_tui.training.batches import RowShape, collate, on_device
from qlora_tui.training.loss import each_token_loss, find_head
from qlora_tui.training.packed_attention import segment_mask


@contextmanager
def no_grad_eval(model: Any) -> Iterator[None]:
    """Use eval mode without gradients in this context, and restore the mode on exit."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def frozen_eval(model: Any) -> Iterator[None]:
    """Use eval mode with frozen parameters in this context, and restore both on exit.

    No parameter requires a gradient, so autograd saves no tensors. But grad mode stays enabled, so that the
    model runs the same code as in a training step. Under ``torch.no_grad``, norms, gated MLPs and the padding
    of attention take other paths, and the last bits of the result would differ.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    # For checkpointing, transformers makes the embedding's output require a gradient.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.detach())
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


ROW_TOKENS = 384
"""Maximum number of tokens in a row, unless one prompt with its answer is longer.

About 250 of them are in answers, which is the number that the chunked loss projects at a time.
"""


@dataclass(frozen=True)
class PromptAndAnswer:
    """Token ids of a prompt with its answer."""

    ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def places(self) -> range:
        """Positions whose next token belongs to the answer."""
        return range(self.prompt_tokens - 1, len(self.ids) - 1)


def answer_logits(
    model: Any, answers: Sequence[PromptAndAnswer], shape: RowShape, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield each answer's index and its logits, in the order of the rows.

    Logits are (answer tokens, vocabulary) in the dtype of the head, at the positions whose next token belongs
    to the answer.
    """
    lengths = [len(answer.ids) for answer in answers]
    capacity = max(*lengths, min(shape.max_length, ROW_TOKENS)) if lengths else 0
    rows: list[PackedSamples] = (
        pack(range(len(answers)), lengths, capacity) if shape.packed else [(i,) for i in range(len(answers))]
    )
    length = -(-capacity // shape.multiple) * shape.multiple if shape.multiple > 1 and shape.packed else 0
    for row in rows:
        parts = [answers[i] for i in row]
        logits = _row_logits(model, parts, shape, length, device)
        start = 0
        for number, part in zip(row, parts, strict=True):
            yield number, logits[start : start + len(part.places)]
            start += len(part.places)


def _row_logits(
    model: Any, parts: Sequence[PromptAndAnswer], shape: RowShape, length: int, device: torch.device
) -> Tensor:
    """Return logits at all answers of one row, (answer tokens and padding, vocabulary)."""
    ids = [token for part in parts for token in part.ids]
    lengths = [len(part.ids) for part in parts]
    more = max(0, length - len(ids))
    lengths[-1] += more
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    places = [start + place for start, part in zip(starts, parts, strict=True) for place in part.places]
    places += places[-1:] * (-len(places) % shape.multiple)
    settings: dict[str, Any] = {"use_cache": False}
    if shape.packed:
        positions = [place for each in lengths for place in range(each)]
        settings = {"segments": lengths, "position_ids": torch.tensor([positions], device=device)}
    logits: Tensor = model(
        input_ids=torch.tensor([ids + [shape.pad_id] * more], device=device),
        logits_to_keep=torch.tensor(places, device=device),
        **settings,
    ).logits
    return logits[0]


def token_losses(
    model: Any,
    samples: TokenizedDataset,
    shape: RowShape,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, ...]]:
    """Return the cross-entropy of each trained token of each sample, in nats.

    The first token of a sample is left out, because no token precedes it.

    Args:
        model: a peft model, with its adapter enabled or disabled.
        progress: called with the number of finished samples, and the number of all samples.
    """
    numbers = range(len(samples))
    rows = (
        pack(numbers, [samples.length(i) for i in numbers], shape.max_length)
        if shape.packed
        else [(i,) for i in numbers]
    )
    losses: list[tuple[float, ...]] = [()] * len(samples)
    done = 0
    with no_grad_eval(model):
        for row in rows:
            batch = collate([row], samples, shape)
            values = _row_losses(model, on_device(batch, device)).tolist()
            for i in row:
                count = sum(samples.loss_mask(i)[1:])
                losses[i], values = tuple(values[:count]), values[count:]
            done += len(row)
            progress(done, len(samples))
    return losses


def _row_losses(model: Any, batch: dict[str, Any]) -> Tensor:
    """Return the loss of each trained token of one row, (tokens,), fp32."""
    bare = model.get_base_model()
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "segments" in batch:
        mask = segment_mask(batch["segments"])
        inputs |= {"position_ids": batch["position_ids"], "attention_mask": mask}
    return each_token_loss(bare, find_head(bare), inputs, batch["labels"], batch["loss_positions"])
