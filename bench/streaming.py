"""Training with streamed layers, bit by bit against training with the whole model on the device.

    python -m bench.streaming [MODEL_FOLDER] [--steps 50] [--streamed 30] [--tokens 96] [--json]

Without a folder it trains SmolLM2-135M-Instruct in NF4, which the demo downloads. On a CPU the device is one
that shows every mistake in the order of copies (``bench.support.recorded_copies``): a buffer holds NaN from
the start of a copy until a layer waits for its end. Losses, and each gradient in each step, must be equal to
the last bit. The bytes of the buffers are compared with the estimate.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.support.recorded_copies import RecordedCopies
from qlora_tui.catalog.config_parser import load_config, parse_architecture
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.weights import streamed_weights
from qlora_tui.recipe.schema import Lora, Model, Quantization, Recipe
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.loss import find_head, use_loss
from qlora_tui.training.model import checkpoint_activations, load_base
from qlora_tui.training.packed_attention import use_packed_attention
from qlora_tui.training.streaming.placement import place_streamed
from qlora_tui.training.streaming.slots import Copies

LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Result:
    """The comparison of one model."""

    device: str
    dtype: str
    steps: int
    streamed: int
    layers: int
    equal_losses: int
    """Steps whose losses are equal to the last bit."""
    equal_gradients: int
    """Steps in which every gradient is."""
    first_loss: float
    last_loss: float
    slot_bytes: int
    estimated_slot_bytes: int
    host_bytes: int
    estimated_host_bytes: int
    copies_per_step: float


def main() -> None:
    """Compare, and print a table; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--streamed", type=int, default=1024, help="layers; by default all")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = args.model or ensure_model(lambda words: print(words, flush=True))
    result = compare(folder, args.steps, args.streamed, args.tokens)
    print(json.dumps(asdict(result)) if args.json else table(result))
    raise SystemExit(not (result.equal_losses == result.equal_gradients == result.steps))


def compare(folder: Path, steps: int, streamed: int, tokens: int) -> Result:
    """Train both ways, one after the other, on the same random tokens."""
    recipe = Recipe(
        model=Model(id=str(folder)),
        quantization=Quantization(streamed_layers=streamed),
        lora=Lora(rank=16, alpha=32.0, dropout=0.05),
    )
    device, architecture = find_device(recipe), parse_architecture(load_config(folder / "config.json"))
    resident = Training(recipe, folder, streamed=False)
    expected = [resident.step(number, tokens) for number in range(steps)]
    del resident
    training = Training(recipe, folder, streamed=True)
    equal_losses = equal_gradients = 0
    losses = []
    for number, (loss, gradients) in enumerate(expected):
        own_loss, own_gradients = training.step(number, tokens)
        equal_losses += torch.equal(own_loss, loss)
        equal_gradients += all(torch.equal(*pair) for pair in zip(own_gradients, gradients, strict=True))
        losses.append(float(own_loss))
    weights = streamed_weights(recipe, architecture, trainer_execution(recipe, Device(), architecture))
    assert weights is not None and training.placed is not None
    copied = training.copies.copied if isinstance(training.copies, RecordedCopies) else math.nan
    return Result(
        device=device.name,
        dtype=device.dtype_name,
        steps=steps,
        streamed=len(training.placed),
        layers=architecture.layers,
        equal_losses=equal_losses,
        equal_gradients=equal_gradients,
        first_loss=losses[0],
        last_loss=losses[-1],
        slot_bytes=training.placed.slot_bytes,
        estimated_slot_bytes=weights.slot_bytes,
        host_bytes=training.placed.host_bytes,
        estimated_host_bytes=weights.host_bytes,
        copies_per_step=copied / steps,
    )


class Training:
    """A model with a new adapter, and its optimizer."""

    def __init__(self, recipe: Recipe, folder: Path, *, streamed: bool) -> None:
        device = find_device(recipe)
        self._device = device.torch_device
        on_cpu = device.kind == "cpu"
        self.copies: Copies = RecordedCopies() if on_cpu else Copies(device.torch_device)
        model: Any = load_base(folder, recipe, device, "segments", to_host=streamed)
        self.placed = (
            place_streamed(model, recipe.quantization.streamed_layers, device.torch_device, self.copies)
            if streamed
            else None
        )
        head = find_head(model)
        assert not isinstance(head, str), head
        use_loss(model, head)
        use_packed_attention(model)
        torch.manual_seed(0)
        self._model = add_lora(model, recipe.lora, parse_architecture(load_config(folder / "config.json")))
        checkpoint_activations(model)
        if self.placed is not None:
            self.placed.use_checkpoints()
        self._model.train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE)

    def step(self, number: int, tokens: int) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of one step on random tokens, in two packed samples."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1000, (1, tokens), generator=generator).to(self._device)
        lengths = [tokens // 3, tokens - tokens // 3]
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(self._device)
        torch.manual_seed(number)
        loss = self._model(
            input_ids=ids, labels=ids, position_ids=positions, segments=lengths, num_items_in_batch=tokens
        ).loss
        loss.backward()
        gradients = [p.grad.clone() for p in self._trained if p.grad is not None]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach(), gradients


def table(result: Result) -> str:
    """The comparison as text."""
    return "\n".join(
        f"{name:<22} {value:,}" if isinstance(value, int) else f"{name:<22} {value}"
        for name, value in asdict(result).items()
    )


if __name__ == "__main__":
    main()
