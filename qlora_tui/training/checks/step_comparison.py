"""One real training step computed twice: by transformers and peft alone, and as this run will compute it.

The checks of single parts (norms, gated MLPs, output head, attention) run each part on inputs prepared for
it. This check covers the whole step: the same tokens, weights and dtype must give the same loss and the same
gradient of every adapter tensor, whatever the model's class does.

"The same" means that the difference is not much larger than the noise. The noise is the change in the
library's own step when the output of each module, and the gradient that comes back through it, is perturbed
by the dtype's rounding error. It is measured here for each tensor, on this model and these tokens (stochastic
arithmetic, as in Vignes 1993, CESTAC).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qlora_tui.data.step_plan import PackedSamples, TokenizedDataset
from qlora_tui.training.batches import RowShape, collate, on_device, sum_loss_weights
from qlora_tui.training.checks.rounding import NOISE_FACTOR, rounding_error_of, rounding_errors
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.loss import IGNORED
from qlora_tui.training.model import dropout_settings
from qlora_tui.training.samples import Sample, SampleList

Gradients: TypeAlias = dict[str, Tensor]
"""Gradient of each trained parameter, keyed by its name in the model."""

_LOSS_ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Relative change of a float32 loss caused by another order of its sums over vocabulary and tokens."""
_ADAPTER_SHARE = 0.05
"""Approximate relative size of the adapter's output, which makes A's gradient meaningful."""
_LARGE = 2**24
"""Number of elements above which only some rows of a gradient are compared, to save memory."""
_COMPARED_ROWS = 4096
"""Number of compared rows of such a gradient, besides those of the excerpt's tokens."""
_FP16_LOSS_SCALE = 1024.0
"""Loss scale of the check, so that small gradients do not vanish in float16."""


def excerpt_of(sequences: Sequence[PackedSamples], samples: TokenizedDataset, *, tokens: int) -> SampleList:
    """Return at most ``tokens`` tokens of the first two samples in ``sequences``, as an excerpt.

    Each sample ends at its last trained token. A second sample is included, if there is one, because packing
    the two into one sequence shows whether one attends to the other.
    """
    first = [i for sequence in sequences for i in sequence][:2]
    each = max(2, tokens // len(first))
    excerpt = []
    for i in first:
        loss_mask, weights = list(samples.loss_mask(i)), samples.weights(i)
        end = max((at + 1 for at, on in enumerate(loss_mask) if on), default=len(loss_mask))
        window = slice(max(0, end - each), end)
        of_window = None if weights is None else weights[window]
        excerpt.append(Sample(samples.token_ids(i)[window], loss_mask[window], of_window))
    return SampleList(excerpt)


@dataclass(frozen=True)
class StepComparison:
    """The distance of our step from the library's, and the library's own rounding noise."""

    loss: float
    reference_loss: float
    loss_noise: float
    gradient_difference: float
    """Relative difference of one tensor's gradient: the tensor that differs most compared with its noise."""
    gradient_noise: float
    """Relative noise of the gradient of that tensor."""
    tensor: str
    """Name of that tensor."""
    failure: str = ""
    """Why our step could not be computed, with NaN as loss and gradients; empty if it was computed."""

    @property
    def agrees(self) -> bool:
        """Return whether rounding explains all differences. False if a value is not finite."""
        return (
            abs(self.loss - self.reference_loss) <= NOISE_FACTOR * self.loss_noise
            and self.gradient_difference <= NOISE_FACTOR * self.gradient_noise
        )


class StepReference:
    """The reference for our training step: the result of the library's step on an excerpt of the data, and
    that step's rounding noise.
    """

    def __init__(self, model: nn.Module, excerpt: SampleList, device: ComputeDevice) -> None:
        """Compute the library's step on ``model``, which must use no fast path; clears its gradients."""
        self._model, self._excerpt, self._device = model, excerpt, device
        self._items = sum_loss_weights([(i,) for i in range(len(excerpt))], excerpt) or 1.0
        self._losses, self._gradients = self._reference_step()
        norms = torch.stack([gradient.norm() for gradient in self._gradients.values()])
        least = torch.finfo(device.dtype).eps * float(norms.square().mean().sqrt())
        self._least = max(least, torch.finfo(torch.float32).tiny)
        """Gradient norm below which rounding errors of the other tensors hide a tensor's gradient."""
        self._matters: float = torch.finfo(device.dtype).eps ** 0.5 * float(norms.square().mean().sqrt())
        """Change that counts as noise if noise dominates, because it is small next to the whole gradient."""
        self._draws = 0
        self.loss = float(self._losses.sum()) / self._items
        self.loss_noise = _LOSS_ROUNDING * abs(self.loss)
        self._noise = dict.fromkeys(self._gradients, 0.0)
        self.measure_noise()

    def measure_noise(self) -> None:
        """Perturb the library's step by random rounding errors, and keep the largest change of all draws.

        The model must use no fast path, as in the constructor.
        """
        with rounding_errors(self._model, rounding_error_of(self._device.dtype), seed=self._draws):
            losses, gradients = self._reference_step()
        self._draws += 1
        moves = losses - self._losses
        # The perturbations of a single draw may cancel in the sum, so the spread within it is the lower
        # bound.
        noise = float(torch.maximum(moves.sum().abs(), moves.norm())) / self._items
        self.loss_noise = max(noise, self.loss_noise)
        for name, gradient in self._gradients.items():
            self._noise[name] = max(float((gradients[name] - gradient).norm()), self._noise[name])

    @property
    def is_finite(self) -> bool:
        """Return whether loss and gradients of the library's step are finite, and can be compared."""
        return math.isfinite(self.loss + self.loss_noise + sum(self._noise.values()))

    def compare(self, *, packed: bool, pad_id: int) -> StepComparison:
        """Run one step as the trainer does, with the current model, and compare it with the library's.

        Args:
            packed: put the samples into one packed sequence instead of padded sequences.
        """
        sequences = (
            [(0, 1)] if packed and len(self._excerpt) == 2 else [(i,) for i in range(len(self._excerpt))]
        )
        shape = RowShape(packed, self._excerpt.tokens, self._device.row_multiple, pad_id)
        batch = collate(sequences, self._excerpt, shape)
        with _autocast(self._device):
            sent = on_device(batch, self._device.torch_device)
            loss = self._model(**sent, num_items_in_batch=1).loss / self._items
        self._model.zero_grad()
        self._backward_of(loss)
        gradients = self._take_gradients()
        differences = {
            name: float((gradients[name] - expected).norm()) for name, expected in self._gradients.items()
        }
        # This form of the comparison makes NaN the largest difference.
        exceeded = {name: differences[name] / self._noise_of(name) for name in differences}
        worst = max(exceeded, key=lambda name: exceeded[name] if math.isfinite(exceeded[name]) else math.inf)
        size = self._size(worst)
        return StepComparison(
            loss=float(loss.detach()),
            reference_loss=self.loss,
            loss_noise=self.loss_noise,
            gradient_difference=differences[worst] / size,
            gradient_noise=self._noise_of(worst) / size,
            tensor=worst,
        )

    def failure(self, reason: str) -> StepComparison:
        """Return the comparison for a step of ours that could not be computed, with the reason."""
        return StepComparison(math.nan, self.loss, self.loss_noise, math.nan, math.nan, "", reason)

    def _size(self, name: str) -> float:
        return max(float(self._gradients[name].norm()), self._least)

    def _noise_of(self, name: str) -> float:
        """Return the noise of a tensor's gradient, at least the smallest gradient that can be resolved.

        If the noise dominates, the tensor fails only if its gradient matters to the whole gradient. The noise
        dominates, for example, in the weights of queries and keys if attention sees a single token: their
        exact gradient is 0. The computed gradient is then caused by the rounding of scores within attention.
        No module's output shows this rounding, and it depends on the order in which a processor adds.
        """
        noise = max(self._noise[name], self._least)
        if NOISE_FACTOR * noise < self._size(name):
            return noise
        return max(noise, self._size(name), self._matters)

    def _reference_step(self) -> tuple[Tensor, Gradients]:
        """Compute each token's weighted loss (tokens,), sample by sample, and the gradients of the mean."""
        excerpt, device = self._excerpt, self._device.torch_device
        losses: list[Tensor] = []
        self._model.zero_grad()
        for i in range(len(excerpt)):
            tokens = torch.tensor([list(excerpt.token_ids(i))], device=device)
            loss_mask = torch.tensor(list(excerpt.loss_mask(i)), device=device)
            targets = tokens[0].masked_fill(loss_mask == 0, IGNORED)[1:]
            trained_at = (targets != IGNORED).nonzero()[:, 0]
            with _autocast(self._device):
                logits = self._model(input_ids=tokens, use_cache=False).logits[0, trained_at]
            each = nn.functional.cross_entropy(logits.float(), targets[trained_at], reduction="none")
            # The logits of each sample are as large as the run's own if the vocabulary is large.
            del logits
            if (weights := excerpt.weights(i)) is not None:
                each = each * torch.tensor(list(weights[1:]), device=device)[trained_at]
            losses.append(each.detach().cpu())
            self._backward_of(each.sum() / self._items)
        return torch.cat(losses), self._take_gradients()

    def _backward_of(self, loss: Tensor) -> None:
        torch.autograd.backward(loss * _FP16_LOSS_SCALE if self._device.dtype == torch.float16 else loss)

    def _take_gradients(self) -> Gradients:
        """Move the gradients out of the model to the CPU, as fp32; of a large matrix only some rows."""
        gradients = {
            name: self._compared(torch.zeros_like(p) if p.grad is None else p.grad.detach())
            for name, p in self._model.named_parameters()
            if p.requires_grad
        }
        self._model.zero_grad()
        return gradients

    def _compared(self, gradient: Tensor) -> Tensor:
        """Return the part of a gradient that is compared, as fp32 on the CPU."""
        if gradient.numel() > _LARGE:
            rows = set(range(0, len(gradient), max(1, len(gradient) // _COMPARED_ROWS)))
            every = (self._excerpt.token_ids(i) for i in range(len(self._excerpt)))
            rows.update(token for ids in every for token in ids if token < len(gradient))
            gradient = gradient[torch.tensor(sorted(rows), device=gradient.device)]
        return gradient.to("cpu", torch.float32)


@contextmanager
def ready_to_compare(model: nn.Module, device: ComputeDevice) -> Iterator[None]:
    """Give the adapter nonzero weights, turn off dropout, and restore everything on exit.

    In a new adapter B is 0, and so is the gradient of A: wrong gradients would agree because all are zero.
    """
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad}
    before = {name: p.detach().to("cpu", copy=True) for name, p in adapters.items()}
    generator = torch.Generator().manual_seed(0)
    # Only the GPU of this process: other GPUs would get a CUDA context.
    devices = [device.torch_device] if device.kind == "cuda" else []
    with _no_dropout(model), torch.random.fork_rng(devices=devices):
        try:
            for name, values in before.items():
                std = _ADAPTER_SHARE / max(values.shape[-1], 1) ** 0.5
                adapters[name].data.copy_(torch.randn(values.shape, generator=generator).mul_(std))
            yield
        finally:
            for name, values in before.items():
                adapters[name].data.copy_(values)
            model.zero_grad()


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Set all dropout probabilities to 0, but stay in training mode for gradient checkpointing."""
    modes = {module: module.training for module in model.modules()}
    probabilities = dropout_settings(model)
    try:
        for owner, name, _ in probabilities:
            setattr(owner, name, 0.0)
        model.train()
        yield
    finally:
        for owner, name, value in probabilities:
            setattr(owner, name, value)
        for module, mode in modes.items():
            module.training = mode


def _autocast(device: ComputeDevice) -> AbstractContextManager[Any]:
    """Return the trainer's autocast context: mixed precision for float16 on a GPU."""
    uses_it = device.kind == "cuda" and device.dtype == torch.float16
    return torch.autocast("cuda", torch.float16) if uses_it else nullcontext()
