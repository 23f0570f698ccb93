"""Exports of a really trained model, which llama.cpp compares with the trained model.

    python -m bench.real_exports [RUN] [--json]        (make real-exports: of the demo's run)

Exports a finished run, by default the last, as F16, Q8_0 and Q4_K_M into a temporary folder. The exit code is
1 if a file diverges from base and adapter as they were trained by more than its limit here, or ranks too few
tokens alike. The limits are for SmolLM2-135M with the demo's adapter; larger models are closer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tui.worker import subprocess_env

LIMITS = {"F16": (0.006, 0.93), "Q8_0": (0.02, 0.88), "Q4_K_M": (0.3, 0.6)}
"""Largest mean KL divergence in nats, and smallest share of positions with the same first token, by name."""


@dataclass(frozen=True)
class ExportedFile:
    """How close a file's answers are to the trained model's."""

    name: str
    divergence: float
    """Mean KL divergence from the trained model, in nats."""
    top1_share: float
    """Share of positions at which both rank the same token first."""

    @property
    def is_within_limits(self) -> bool:
        """Whether both figures are within the limits. NaN is not."""
        most, least = LIMITS[self.name]
        return self.divergence <= most and self.top1_share >= least

    def __str__(self) -> str:
        most, least = LIMITS[self.name]
        verdict = "ok" if self.is_within_limits else "OUTSIDE"
        return (
            f"{self.name:<7} KL {self.divergence:.2g} (at most {most:g})   same first token at "
            f"{self.top1_share:.1%} (at least {least:.0%})   {verdict}"
        )


def main() -> int:
    """Export, and print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?", default="last")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(args.run, Path(folder))
    print(json.dumps([asdict(file) for file in files]) if args.json else "\n".join(map(str, files)))
    return 0 if all(file.is_within_limits for file in files) else 1


def export_all(run: str, out: Path, types: Iterable[str] = LIMITS) -> list[ExportedFile]:
    """Export ``run`` as these types into the folder ``out``. Ends this program if one is not checked."""
    written = _export("gguf", run, str(out), "--quant", ",".join(types))
    if written["unchecked_because"]:
        raise SystemExit(f"The files were not compared: {written['unchecked_because']}.")
    return [_compared(file["file_type"], file["proof"]) for file in written["files"]]


def _export(form: str, *arguments: str) -> Any:
    """Run the export command; return its JSON output."""
    command = [sys.executable, "-m", "qlora_tui", "export", form, *arguments, "--json"]
    done = subprocess.run(command, env=subprocess_env(), stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def _compared(name: str, proof: dict[str, Any]) -> ExportedFile:
    return ExportedFile(name, proof["divergence"], proof["top1_matches"] / proof["positions"])


if __name__ == "__main__":
    sys.exit(main())
