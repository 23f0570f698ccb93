"""Loss of each trained token of each training sample, with a model as it is; without gradients."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.batches import TokenizedDataset, collate, on_device, pack
from qlora_tui.training.chunked_loss import find_head
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.forgetting.answer_logits import RowShape
from qlora_tui.training.packed_attention import segment_mask
from qlora_tui.training.token_losses import token_losses as each_token_loss


class OtherPrompts:
    """Each sample's answer after the prompt of the next sample; a ``TokenizedDataset``.

    An answer begins at the first trained token.
    """

    def __init__(self, samples: TokenizedDataset, max_length: int) -> None:
        """``max_length``: tokens of a sample; a longer prompt loses its beginning."""
        self._samples = samples
        self._max_length = max_length
        self._prompts = [_prompt_tokens(samples, i) for i in range(len(samples))]

    def __len__(self) -> int:
        return len(self._samples)

    def token_ids(self, i: int, /) -> Sequence[int]:
        """Token ids of sample ``i``."""
        following = (i + 1) % len(self._samples)
        answer = list(self._samples.token_ids(i))[self._prompts[i] :]
        prompt = list(self._samples.token_ids(following))[: self._prompts[following]]
        return prompt[max(0, len(prompt) + len(answer) - self._max_length) :] + answer

    def loss_mask(self, i: int, /) -> Sequence[int]:
        """1 for each token in the loss, else 0."""
        answer = list(self._samples.loss_mask(i))[self._prompts[i] :]
        return [0] * (self.length(i) - len(answer)) + answer

    def weights(self, i: int, /) -> None:
        """None: each token in the loss counts as one."""

    def length(self, i: int, /) -> int:
        """Length of sample ``i`` in tokens."""
        return len(self.token_ids(i))

    def epoch(self, epoch: int, seed: int, /) -> Sequence[int]:
        """Indices of all samples, in order."""
        return array("I", range(len(self)))


def token_losses(
    model: Any,
    samples: TokenizedDataset,
    shape: RowShape,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, ...]]:
    """Cross-entropy of each trained token of each sample, in nats.

    The first token of a sample has none, since it is predicted from nothing; it is left out.

    Args:
        model: a peft model, with its adapter enabled or disabled.
        progress: called with the number of samples done, and of all.
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
            batch = collate(
                [row], samples, padding_free=shape.packed, pad_id=shape.pad_id, multiple=shape.multiple
            )
            values = _row_losses(model, on_device(batch, device)).tolist()
            for i in row:
                count = sum(samples.loss_mask(i)[1:])
                losses[i], values = tuple(values[:count]), values[count:]
            done += len(row)
            progress(done, len(samples))
    return losses


def _row_losses(model: Any, batch: dict[str, Any]) -> Tensor:
    """Loss of each trained token of one row, (tokens,), fp32."""
    bare = model.get_base_model()
    positions: Tensor = batch["loss_positions"]
    targets = batch["labels"].flatten().index_select(0, positions + 1)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "segments" in batch:
        inputs |= {
            "position_ids": batch["position_ids"],
            "attention_mask": segment_mask(batch["segments"]),
        }
    head = find_head(bare)
    if isinstance(head, str):
        inputs.pop("attention_mask", None)
        more = {"segments": batch["segments"]} if "segments" in batch else {}
        logits = bare(**inputs, **more, logits_to_keep=positions).logits[0]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    states = bare.get_decoder()(**inputs)[0].flatten(0, 1).index_select(0, positions)
    return each_token_loss(states, targets, head)


def _prompt_tokens(samples: TokenizedDataset, i: int) -> int:
    """Tokens of a sample before its first trained token."""
    mask = list(samples.loss_mask(i))
    return mask.index(1) if 1 in mask else len(mask)
