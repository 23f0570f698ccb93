"""Speed of a step in which some layers keep their activations, beside the predicted speed.

    python -m bench.kept_layers MODEL_FOLDER [--tokens 384] [--repeats 5] [--json]

All counts of kept layers take turns in one process, in an order that is reversed every time; medians, without
the first step of each. On a CPU the process's CPU time is taken, which other programs disturb less; on a GPU
the wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.memory.kept_layers import speedup
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Training
from qlora_tui.training import chunked_loss, model_loading
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.compute_device import ComputeDevice, find_device

SHARES = (0.0, 0.5, 1.0)
"""Shares of the layers that keep their activations."""
SAMPLES = 4


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=384, help="of a row, in four samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    length = args.tokens // SAMPLES
    recipe = Recipe(
        model=Model(id=str(args.model)),
        lora=Lora(rank=16, alpha=32.0, dropout=0.0),
        data=Data(max_length=length),
        training=Training(micro_batch_size=SAMPLES),
    )
    device = find_device(recipe)
    architecture = resolve_model(recipe.model.id).architecture
    base = model_loading.load_base(args.model, recipe, device, "segments")
    model = with_adapter(base, recipe, architecture)
    counts = [round(share * architecture.layers) for share in SHARES]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(args.repeats + 1):
        for count in counts if repeat % 2 else reversed(counts):
            assert model_loading.keep_activations(base, count)
            took = step_seconds(model, length, device)
            if repeat:
                seconds[count].append(took)
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    rows = [
        {
            "kept": count,
            "layers": architecture.layers,
            "seconds": medians[count],
            "speedup": medians[0] / medians[count],
            "predicted": speedup(recipe, architecture, count),
        }
        for count in counts
    ]
    print(json.dumps({"device": device.name, "rows": rows}) if args.json else table(device, rows))


def with_adapter(base: Any, recipe: Recipe, architecture: Architecture) -> Any:
    """The model as a run trains it: packed attention, chunked loss, adapter, every layer checkpointed."""
    head = chunked_loss.find_head(base)
    assert not isinstance(head, str), head
    assert model_loading.use_packed_attention(base)
    chunked_loss.use_chunked_loss(base, head)
    chunked_loss.use_segments(base)
    model = add_lora(base, recipe.lora, architecture)
    model_loading.checkpoint_activations(base)
    return model.train()


def step_seconds(model: Any, length: int, device: ComputeDevice) -> float:
    """Seconds of a forward and backward over one row of samples."""
    tokens = SAMPLES * length
    ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(SAMPLES)[None]
    on_gpu = device.kind == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    model.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    loss = model(
        input_ids=ids.to(device.torch_device),
        labels=ids.to(device.torch_device),
        position_ids=positions.to(device.torch_device),
        segments=[length] * SAMPLES,
        num_items_in_batch=tokens,
    ).loss
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def table(device: ComputeDevice, rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [device.name, "kept layers   s/step   speed   predicted"]
    for row in rows:
        lines.append(
            f"{row['kept']:>3} of {row['layers']:<4} {row['seconds']:>9.3f} {row['speedup']:>6.2f}x "
            f"{row['predicted']:>9.2f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
