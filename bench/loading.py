"""Time to load a base model: quantizing its 16-bit files, and reading weights that were quantized earlier.

    python -m bench.loading MODEL_FOLDER [--repeats 3] [--json]

Both take turns in one process and a private cache, in an order that is reversed every time, after a load that
is not counted; medians of wall time. The first load also writes the quantized weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Measure, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        report = measure(args.model, args.repeats)
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"{report['device']}: {report['quantizing_s']:.2f} s quantizing, of which "
            f"{report['storing_s']:.2f} s storing; {report['stored_s']:.2f} s from stored weights "
            f"({report['ratio']:.3f} of that, {report['stored_bytes'] / 2**20:,.0f} MiB)"
        )


def measure(model: Path, repeats: int) -> dict[str, object]:
    """Load in turns; every time is in seconds."""
    from qlora_tui.recipe.schema import Model, Recipe
    from qlora_tui.training import quantized_cache
    from qlora_tui.training.compute_device import find_device
    from qlora_tui.training.model import load_base

    recipe = Recipe(model=Model(id=str(model)))
    device = find_device(recipe)
    stored = quantized_cache.cache_path(model, recipe, device)
    assert stored is not None, "this base is not quantized to 4 bits when it is loaded"
    storing: list[float] = []
    store = quantized_cache.store

    def timed_store(*given: object) -> None:
        began = time.perf_counter()
        store(*given)  # type: ignore[arg-type]
        storing.append(time.perf_counter() - began)

    quantized_cache.store = timed_store  # type: ignore[assignment]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    load_base(model, recipe, device, "segments")
    storing.clear()
    for repeat in range(repeats):
        for from_stored in (False, True) if repeat % 2 else (True, False):
            if not from_stored:
                shutil.rmtree(stored)
            began = time.perf_counter()
            load_base(model, recipe, device, "segments")
            seconds[from_stored].append(time.perf_counter() - began)
    quantizing_s, stored_s = (statistics.median(seconds[key]) for key in (False, True))
    return {
        "device": device.name,
        "quantizing_s": quantizing_s,
        "storing_s": statistics.median(storing),
        "stored_s": stored_s,
        "ratio": stored_s / quantizing_s,
        "stored_bytes": sum(file.stat().st_size for file in stored.iterdir()),
    }


if __name__ == "__main__":
    main()
