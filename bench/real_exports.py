"""Exports of a really trained model, compared by llama.cpp with the model as it was trained.

:mod:`bench.real_models` calls this after its training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.subprocesses import subprocess_env

LIMITS = {"F16": 0.006, "Q8_0": 0.02, "Q4_K_M": 0.3}
"""Largest mean KL divergence of a file of each type from base and adapter as they were trained, in nats."""
LORA = "LoRA"
LORA_LIMIT = 0.006
"""The same of the LoRA, beside a 16-bit file of the base weights of the training."""


@dataclass(frozen=True)
class ExportedFile:
    """How near a file answers."""

    name: str
    divergence: float
    """Mean KL divergence from the trained model, in nats."""
    top1_share: float
    """Share of positions at which both rank the same token first."""
    limit: float
    """Largest divergence that rounding explains."""

    @property
    def within_limit(self) -> bool:
        """Whether rounding explains the divergence. It does not explain NaN."""
        return self.divergence <= self.limit

    def __str__(self) -> str:
        verdict = "within" if self.within_limit else "OUTSIDE"
        return (
            f"{self.name:<6} KL {self.divergence:.2g}, {verdict} the limit of {self.limit:g};"
            f" same first token at {self.top1_share:.1%}"
        )


def export_last(home: Path, out: Path) -> list[ExportedFile]:
    """Export the last run of a private home in every form.

    Args:
        home: Holds the folders ``config``, ``state`` and ``cache``.
        out: A folder for the files.
    """
    written = _export(home, "gguf", str(out), "--quant", ",".join(LIMITS))
    files = [_compared(file["file_type"], file["proof"]) for file in written["files"]]
    lora = _export(home, "lora", str(out / "lora.gguf"))
    return [*files, _compared(LORA, lora["proof"])]


def _export(home: Path, form: str, *arguments: str) -> Any:
    """Run the command; return its JSON. Ends this program where it fails."""
    homes = {f"XDG_{kind.upper()}_HOME": str(home / kind) for kind in ("config", "state", "cache")}
    command = [sys.executable, "-m", "qlora_tui", "export", form, "last", *arguments, "--json"]
    done = subprocess.run(command, env={**subprocess_env(), **homes}, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}.")
    return json.loads(done.stdout)


def _compared(name: str, proof: dict[str, Any]) -> ExportedFile:
    share = proof["top1_matches"] / proof["positions"]
    return ExportedFile(name, proof["divergence"], share, LIMITS.get(name, LORA_LIMIT))
