"""Writes the training data of a run of this program, step by step, to a file that other trainers use.

``python -m bench.baselines.batches JOB.json`` renders and lays out the rows as the run will, and writes
``job.batches``. It prints ``data`` with the digest that the run prints too, which shows that both read the
same tokens and labels.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.baselines.job import TrainingJob, read_job, tell
from bench.baselines.qlora_tui_run import recipe, use_private_home
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.step_plan import PlannedStep, TokenizedDataset, plan_steps
from qlora_tui.data.tokenizer import ChatTokenizer

IGNORED = -100
"""Label of a token that is not trained."""


def main() -> None:
    """Write the steps of the job that the command line names."""
    job = read_job()
    use_private_home(job)
    tell("data", hash=write_batches(job))


def write_batches(job: TrainingJob) -> str:
    """Render and lay out the rows, and write ``job.batches``; return the digest."""
    wanted = recipe(job)
    tokenizer = ChatTokenizer.from_folder(resolve_model(job.model).folder, wanted.model.chat_template)
    data = prepare_dataset(wanted, tokenizer)
    schedule = plan_steps(data.train, wanted, padding_free=True)
    write_steps(schedule.steps, data.train, Path(job.batches))
    return data.data_hash


def write_steps(steps: tuple[PlannedStep, ...], samples: TokenizedDataset, path: Path) -> None:
    """Write one line of JSON per step: its samples in order, each with ``input_ids`` and ``labels``."""
    with path.open("w") as lines:
        for step in steps:
            rows = [sample(samples, i) for sequence in step.sequences for i in sequence]
            lines.write(json.dumps(rows) + "\n")


def sample(samples: TokenizedDataset, i: int) -> dict[str, list[int]]:
    """Return token ids and labels of one sample."""
    ids = list(samples.token_ids(i))
    loss_mask = samples.loss_mask(i)
    return {
        "input_ids": ids,
        "labels": [token if use else IGNORED for token, use in zip(ids, loss_mask, strict=True)],
    }


if __name__ == "__main__":
    main()
