"""What a run does with free memory, by the predicted time of a step: calculated, not measured.

    python -m bench.step_choice

It is compared with one row at a time, every layer recomputed and 8-bit states: kernels that a step launches
(counted per layer at commit 7720e8a0), and bytes read and written to dequantize 4-bit weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.memory import Device, StepChoice, choose_step
from qlora_tui.recipe.schema import Data, Recipe

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.1-8B")
GIB = (8, 12, 16, 24)
LENGTH = 1024
LAUNCHES = 132
"""Kernels of a layer in forward, recomputation and backward, with Triton's, counted at commit 7720e8a0."""
SHARE = 0.95
"""Of a GPU's memory that is free: its context and the display take the rest."""


def main() -> None:
    """Print a row of a Markdown table for each model and size."""
    print("| model | GPU | batch 8 | optimizer | layers kept | GiB | launches | GB unpacked | speed |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for model in MODELS:
        architecture = parse_architecture(
            json.loads((CONFIGS / f"{model.replace('/', '__')}.json").read_text())
        )
        for gib in GIB:
            free, recipe = int(gib * SHARE * 2**30), Recipe(data=Data(max_length=LENGTH))
            choice = choose_step(recipe, architecture, free, device=Device(triton=True))
            print(f"| {model.partition('/')[2]} | {gib} GiB | {_cells(choice, architecture)} |")


def _cells(choice: StepChoice, architecture: Architecture) -> str:
    training, layers = choice.recipe.training, architecture.layers
    passes = (choice.given.training.gradient_accumulation, training.gradient_accumulation)
    weights = sum(module.weight_params for module in architecture.modules if module.layer is not None)
    # Forward and backward, and the recomputation of the layers that are not kept.
    reads = (3.0, 3 - choice.kept_layers / layers)
    launches = (f"{count * layers * LAUNCHES:,}" for count in passes)
    gigabytes = (count * read * weights * 2.5e-9 for count, read in zip(passes, reads, strict=True))
    unpacked = (f"{size:,.0f}" for size in gigabytes)
    cells = (
        f"{training.micro_batch_size} × {training.gradient_accumulation}",
        training.optimizer,
        f"{choice.kept_layers} of {layers}",
        f"{choice.estimate.total_bytes / 2**30:.1f}",
        " → ".join(launches),
        " → ".join(unpacked),
        f"{choice.speedup:.2f}×",
    )
    return " | ".join(cells)


if __name__ == "__main__":
    main()
