"""First frame and memory of the app beside an empty Textual app, in one run.

    python -m bench.startup [--repeats N] [--json]

Budgets: first frame at most 1.5 times the empty app's, and at most 100 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile

from bench.support.turns import in_turn
from bench.terminal import Terminal

EMPTY = """
from textual.app import App
from textual.widgets import Static

class Empty(App):
    def compose(self):
        yield Static("ready")

Empty().run()
"""
PROGRAMS = {
    "empty Textual app": ([sys.executable, "-c", EMPTY], "ready"),
    "qlora-tui": ([sys.executable, "-m", "qlora_tui"], "Train"),
}
_SETTLED_S = 1.5
"""After the first frame, before memory is read."""


def measure(command: list[str], marker: str, home: str) -> tuple[float, int]:
    """Seconds to the first frame, and resident bytes once it has settled."""
    env = {f"XDG_{kind}_HOME": f"{home}/{kind.lower()}" for kind in ("CONFIG", "STATE", "CACHE")}
    # Byte code is kept, as where it is installed, whatever this shell says: else only ours would be compiled.
    env |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{home}/bytecode"}
    with Terminal(command, env=env) as terminal:
        first_frame = terminal.wait_for(marker)
        terminal.watch(_SETTLED_S)
        return first_frame, terminal.memory_bytes()


def main() -> int:
    """Measure, alternating; print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as home:
        for command, marker in PROGRAMS.values():
            measure(command, marker, home)  # warms disk and byte code
        for repeat in range(args.repeats):
            for name in in_turn(PROGRAMS, repeat):
                results[name].append(measure(*PROGRAMS[name], home))
    result = {
        name: {
            "first_frame_s": round(statistics.median(seconds for seconds, _ in samples), 3),
            "memory_bytes": int(statistics.median(memory for _, memory in samples)),
        }
        for name, samples in results.items()
    }
    empty, ours = (result[name] for name in PROGRAMS)
    ratio = ours["first_frame_s"] / empty["first_frame_s"]
    if args.json:
        print(json.dumps({"programs": result, "first_frame_ratio": round(ratio, 3), "repeats": args.repeats}))
        return 0
    for name, one in result.items():
        print(
            f"{name:<18} first frame {one['first_frame_s']:.2f} s   memory {one['memory_bytes'] / 1e6:.0f} MB"
        )
    print(f"ratio {ratio:.2f} (budget 1.5), medians of {args.repeats}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
