"""The job that every trainer gets, and the events that it prints. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingJob:
    """One pass over some conversations, the same for every trainer."""

    model: str
    """Folder of the base model."""
    rows: str
    """JSONL of ``messages``: one user turn, one assistant turn. Only the assistant's is trained."""
    out: str
    """Folder for the adapter."""
    dtype: str
    """Dtype of the computation: ``float32`` or ``bfloat16``."""
    validation: str = ""
    """JSONL like ``rows``, for validation; empty for none."""
    method: Literal["nf4", "fp4", "none"] = "nf4"
    double: bool = True
    """Double quantization."""
    samples_per_step: int = 4
    """Samples per optimizer step, where they are not packed."""
    row_tokens: int = 1024
    """Tokens of a packed sequence, one per step: about ``samples_per_step`` samples fill it."""
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    warmup_ratio: float = 0.0
    """Fraction of the steps in which the learning rate rises."""
    max_steps: int = 0
    """Optimizer steps at most; 0 for one pass over the rows."""
    batches: str = ""
    """File that :mod:`.batches` wrote: the rows as token ids and labels, step by step; empty where each way
    renders them by itself."""
    checkpointing: bool = False
    preferences: Literal["", "orpo", "dpo"] = ""
    """The method where ``rows`` holds ``prompt``, ``chosen`` and ``rejected``."""
    seed: int = 1

    def write(self, path: Path) -> Path:
        """To a file, for a program's argument."""
        path.write_text(json.dumps(asdict(self)))
        return path


def read_job() -> TrainingJob:
    """Read the job named on the command line."""
    return TrainingJob(**json.loads(Path(sys.argv[1]).read_text()))


def conversations(job: TrainingJob) -> list[list[dict[str, str]]]:
    """The messages of every row."""
    return [json.loads(line)["messages"] for line in Path(job.rows).read_text().splitlines()]


def steps_of(job: TrainingJob) -> list[list[dict[str, list[int]]]]:
    """The samples of each optimizer step, as ``input_ids`` and ``labels`` of equal length."""
    return [json.loads(line) for line in Path(job.batches).read_text().splitlines()]


def tell(event: str, **values: Any) -> None:
    """Print one event for the program that measures.

    ``loaded`` (``pid`` of the process that trains, ``allocated`` bytes on the GPU), ``step`` (``tokens`` and
    ``trained`` tokens so far, ``loss`` and, where known, ``grad_norm`` before clipping), ``peak`` (most bytes
    ``allocated`` on the GPU), ``data`` (``hash`` of every token and label read).
    """
    print(json.dumps({"event": event} | {"at": time.time()} | values), flush=True)
