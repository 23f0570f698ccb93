"""The input of a check, and its outcome. Standard library only."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["ok", "failed", "skipped", "out of time"]


@dataclass(frozen=True)
class CheckContext:
    """The input of a check."""

    model: str
    """Folder of the model."""
    rows: str
    long_rows: str
    """Data whose samples are all as long as the longest sequence of the grid."""
    scratch: str
    size: str
    has_gpu: bool
    deadline: float = float("inf")
    """Value of ``time.monotonic`` at which the check is killed."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the check is killed."""
        return self.deadline - time.monotonic()

    def write(self, path: Path) -> Path:
        """Write the context to a file, for another process."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> CheckContext:
        """Read a file that :meth:`write` wrote."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check."""

    result: Result
    summary: str
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ok: bool, summary: str, figures: dict[str, Any]) -> Outcome:
        """Return the outcome of a check that ran to its end."""
        return cls("ok" if ok else "failed", summary, figures)


class CheckSkipped(Exception):
    """This machine cannot run the check. The message says why."""
