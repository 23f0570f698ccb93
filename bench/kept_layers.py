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

from bench.support.training_step import StepModel, load_step_model
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.memory import Device
from qlora_tui.memory.step_choice import step_seconds as predicted_seconds
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Training
from qlora_tui.training import model_loading
from qlora_tui.training.compute_device import ComputeDevice

SHARES = (0.0, 0.5, 1.0)
"""Shares of the layers that keep their activations."""
CPU = Device(kind="cpu")
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
    loaded = load_step_model(args.model, recipe)
    device, architecture = loaded.device, resolve_model(recipe.model.id).architecture
    counts = [round(share * architecture.layers) for share in SHARES]
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(args.repeats + 1):
        for count in counts if repeat % 2 else reversed(counts):
            assert model_loading.apply_kept_layers(loaded.base.model, count)
            took = step_seconds(loaded, length)
            if repeat:
                seconds[count].append(took)
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    rows = [
        {
            "kept": count,
            "layers": architecture.layers,
            "seconds": medians[count],
            "speedup": medians[0] / medians[count],
            "predicted": predicted_seconds(recipe, architecture, CPU)
            / predicted_seconds(recipe, architecture, CPU, count),
        }
        for count in counts
    ]
    print(json.dumps({"device": device.name, "rows": rows}) if args.json else table(device, rows))


def step_seconds(loaded: StepModel, length: int) -> float:
    """Seconds of a forward and backward over one row of samples."""
    on_gpu = loaded.device.kind == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    loaded.run([length] * SAMPLES)
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
