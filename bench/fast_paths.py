"""Speed and memory of a step with all fast paths, without each of them, and with none.

    python -m bench.fast_paths MODEL_FOLDER [--samples 8] [--tokens 2048] [--repeats 5] [--seconds 300]
                               [--checkpointing on off] [--json]

All variants take turns in one process on the same samples, in an order that is reversed every time; medians,
without the first step of each. Without packed attention each sample is a row; as all have one length, nothing
is padded. Peaks are torch's count on a GPU, the loaded model included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env

# Before torch is imported.
configure_torch_env(allocator_variables(os.environ))

import torch  # noqa: E402

from bench.support.training_step import StepModel, load_step_model  # noqa: E402
from qlora_tui.recipe.schema import Data, Lora, Model, Recipe, Training  # noqa: E402
from qlora_tui.training.checks.first_step import FastPath, FastPaths  # noqa: E402
from qlora_tui.training.failures import is_out_of_memory  # noqa: E402

Variant = dict[str, Any]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="in the row")
    parser.add_argument("--tokens", type=int, default=2048, help="of the row")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="after these no step is begun")
    parser.add_argument("--checkpointing", nargs="*", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    lengths = [args.tokens // args.samples] * args.samples
    rows: list[Variant] = []
    for checkpointing in args.checkpointing:
        recipe = Recipe(
            model=Model(id=str(args.model)),
            lora=Lora(rank=16, dropout=args.dropout),
            data=Data(max_length=args.tokens),
            training=Training(micro_batch_size=1, gradient_checkpointing=checkpointing),
        )
        loaded = load_step_model(args.model, recipe)
        for row in measure(loaded, lengths, args.repeats, until):
            rows.append({"checkpointing": checkpointing} | row)
        del loaded
    print(json.dumps({"rows": rows}) if args.json else table(rows))


def measure(loaded: StepModel, lengths: list[int], repeats: int, until: float) -> list[Variant]:
    """Return the speed and peak of each variant; ``until`` is the moment after which no step is begun."""
    paths = FastPaths(loaded.model, loaded.base)
    variants: dict[str, Collection[FastPath]] = {"all": paths.names}
    variants |= {f"without {name}": set(paths.names) - {name} for name in paths.names}
    variants["none"] = ()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int] = dict.fromkeys(variants, 0)
    failed: set[str] = set()
    for repeat in range(repeats + 1):
        for name in list(variants) if repeat % 2 else reversed(variants):
            if name in failed or time.monotonic() > until:
                continue
            paths.use(variants[name])
            try:
                took, peak = step(loaded, lengths, packed="packed attention" in variants[name])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failed.add(name)
                continue
            if repeat:
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
    paths.use(paths.names)
    return [
        {
            "variant": name,
            "tokens_per_s": sum(lengths) / statistics.median(seconds[name]) if seconds[name] else None,
            "peak_bytes": peaks[name],
            "repeats": len(seconds[name]),
            "out_of_memory": name in failed,
        }
        for name in variants
    ]


def step(loaded: StepModel, lengths: list[int], *, packed: bool) -> tuple[float, int]:
    """Return the seconds of a forward and backward, and on a GPU the most that was allocated."""
    on_gpu = loaded.device.kind == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loaded.run(lengths, packed=packed)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0


def table(rows: list[Variant]) -> str:
    """Return the rows for people."""
    lines = ["checkpointing  variant                        tokens/s   peak GiB"]
    for row in rows:
        speed = "out of memory" if row["out_of_memory"] else "not measured"
        if row["tokens_per_s"] is not None:
            speed = f"{row['tokens_per_s']:,.0f}"
        lines.append(
            f"{row['checkpointing']:<14} {row['variant']:<28} {speed:>10} {row['peak_bytes'] / 2**30:>10.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
