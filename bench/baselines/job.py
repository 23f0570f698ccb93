"""The job that every trainer gets, and the events that each trainer prints. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingJob:
    """One pass over a set of conversations, the same for every trainer."""

    model: str
    """Folder of the base model."""
    rows: str
    """JSONL of ``messages``: one user turn, one assistant turn. Only the assistant's turn is trained."""
    out: str
    """Output folder of the adapter."""
    dtype: str
    """Dtype of the computation: ``float32`` or ``bfloat16``."""
    validation: str = ""
    """Validation data in the format of ``rows``; empty for none."""
    method: Literal["nf4", "fp4", "none"] = "nf4"
    double: bool = True
    """Whether to use double quantization."""
    samples_per_step: int = 4
    """Samples per optimizer step, if they are not packed."""
    row_tokens: int = 1024
    """Tokens of a packed sequence, one per step. About ``samples_per_step`` samples fill it."""
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 2e-4
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    warmup_ratio: float = 0.0
    """Fraction of the steps in which the learning rate rises."""
    max_steps: int = 0
    """Maximum number of optimizer steps; 0 for one pass over the rows."""
    batches: str = ""
    """File that :mod:`.batches` wrote, with the rows as token ids and labels, step by step. If empty, each
    trainer renders the rows itself."""
    checkpointing: bool = False
    preferences: Literal["", "orpo", "dpo"] = ""
    """Preference method if ``rows`` has ``prompt``, ``chosen`` and ``rejected``; otherwise empty."""
    seed: int = 1

    def write(self, path: Path) -> Path:
        """Write the job to a file, for a program's argument, and return the file."""
        path.write_text(json.dumps(asdict(self)))
        return path


def read_job() -> TrainingJob:
    """Read the job that the command line names."""
    return TrainingJob(**json.loads(Path(sys.argv[1]).read_text()))


def conversations(job: TrainingJob) -> list[list[dict[str, str]]]:
    """Return the messages of every row."""
    return [json.loads(line)["messages"] for line in Path(job.rows).read_text().splitlines()]


def steps_of(job: TrainingJob) -> list[list[dict[str, list[int]]]]:
    """Return the samples of each optimizer step, as ``input_ids`` and ``labels`` of equal length."""
    return [json.loads(line) for line in Path(job.batches).read_text().splitlines()]


def tell(event: str, **values: Any) -> None:
    """Print one event for the measuring program.

    The events are ``loaded`` (``pid`` of the training process, ``allocated`` bytes on the GPU), ``step``
    (``tokens`` and ``trained`` tokens so far, ``loss`` and, if known, ``grad_norm`` before clipping),
    ``peak`` (peak of ``allocated`` bytes on the GPU), and ``data`` (``hash`` of all tokens and labels).
    """
    print(json.dumps({"event": event} | {"at": time.time()} | values), flush=True)
