"""Bytes that a key costs on Memory: what a slow link has to carry.

    python -m bench.key_bytes [--presses N] [--json]

The app on a pseudo-terminal, Qwen2.5-7B on a GPU of 24 GiB. After each press all is counted that is painted
until nothing came for a second, the estimates that follow included. No figure depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.terminal import Terminal
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.workbench import Workbench

SIZES = ((80, 24), (120, 40), (200, 60))
KEYS = {
    "next item": "jjjjkkkk",
    "next precision": "\t\t\t\t",
    "longer, shorter": "sSsS",
    "rank up, down": "rRrR",
    "checkpointing": "cccc",
}
_CONFIG = Path(__file__).parents[1] / "tests/configs/Qwen__Qwen2.5-7B.json"
_QUIET_S = 1.0


def measure(presses: int) -> Iterator[dict[str, object]]:
    """Yield for each size and kind of key the median and the most bytes of a press."""
    for size in SIZES:
        command = [sys.executable, "-m", "qlora_tui", "--gpu-gib", "24"]
        with Terminal(command, columns=size[0], rows=size[1]) as terminal:
            terminal.wait_for("Home")
            _settle(terminal)
            terminal.press("3")
            terminal.wait_for("Peak")
            _settle(terminal)
            for name, keys in KEYS.items():
                costs = []
                for number in range(presses):
                    terminal.press(keys[number % len(keys)])
                    costs.append(_settle(terminal))
                yield {
                    "size": f"{size[0]}x{size[1]}",
                    "key": name,
                    "bytes_median": round(statistics.median(costs)),
                    "bytes_most": max(costs),
                }


def _settle(terminal: Terminal) -> int:
    """Read until nothing is painted for a while; the bytes painted."""
    total = 0
    while painted := terminal.watch(_QUIET_S):
        total += painted
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presses", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {f"XDG_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("CONFIG", "STATE", "CACHE")}
        model = Path(home) / "Qwen2.5-7B"
        model.mkdir()
        shutil.copy(_CONFIG, model / "config.json")
        workbench = Workbench()
        workbench.replace(replace_setting(workbench.recipe, "model.id", str(model)))
        Draft().save(workbench, replace=True)
        rows = []
        for row in measure(args.presses):
            rows.append(row)
            if not args.json:
                print(*row.values(), sep="\t", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
