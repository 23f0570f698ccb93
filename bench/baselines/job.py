"""What every way is given, and how it tells what it does. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One pass over some conversations: the same for every way."""

    model: str
    """Folder of the base model."""
    rows: str
    """JSONL of ``messages``: one user turn, one assistant turn. Only the assistant's is learnt from."""
    out: str
    """Folder for the adapter."""
    dtype: str
    """Of the computation: ``float32`` or ``bfloat16``."""
    validation: str = ""
    """JSONL like ``rows``, for judging; empty where nothing is judged."""
    method: str = "nf4"
    """``nf4``, ``fp4`` or ``none``."""
    double: bool = True
    """Double quantization."""
    samples_a_step: int = 4
    """Samples an optimizer step learns from, where they are not packed."""
    row_tokens: int = 1024
    """Tokens of a packed row, one to a step: chosen so that about ``samples_a_step`` samples fill it."""
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    schedule: str = "constant"
    """``constant`` or ``cosine``."""
    warmup: float = 0.0
    """Share of the steps in which the rate rises."""
    max_steps: int = 0
    """Optimizer steps at most; 0 for one pass over the rows."""
    batches: str = ""
    """File that :mod:`.batches` wrote: the rows as token ids and labels, step by step; empty where each way
    renders them by itself."""
    checkpointing: bool = False
    seed: int = 1

    def write(self, path: Path) -> Path:
        """To a file, for a program's argument."""
        path.write_text(json.dumps(asdict(self)))
        return path


def given() -> Work:
    """The work named on the command line."""
    return Work(**json.loads(Path(sys.argv[1]).read_text()))


def conversations(work: Work) -> list[list[dict[str, str]]]:
    """The messages of every row."""
    return [json.loads(line)["messages"] for line in Path(work.rows).read_text().splitlines()]


def steps_of(work: Work) -> list[list[dict[str, list[int]]]]:
    """The samples of each optimizer step, as ``input_ids`` and ``labels`` of equal length."""
    return [json.loads(line) for line in Path(work.batches).read_text().splitlines()]


def tell(event: str, **values: Any) -> None:
    """One line to whoever measures.

    ``loaded`` (``pid`` of the process that trains, ``allocated`` bytes on the GPU), ``step`` (``tokens`` and
    ``trained`` tokens so far, ``loss`` and, where known, ``grad_norm`` before clipping), ``peak`` (most bytes
    ``allocated`` on the GPU), ``data`` (``hash`` of every token and label read).
    """
    print(json.dumps({"event": event} | {"at": time.time()} | values), flush=True)
