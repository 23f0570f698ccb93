"""TRL's trainers for pairs of answers: ``DPOTrainer``, and ``ORPOTrainer`` of its experimental part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from bench.baselines.hf_trainer import TellSteps, common, load_quantized, lora, train_counted
from bench.baselines.job import TrainingJob, read_job


def main() -> None:
    """Train once over the pairs."""
    job = read_job()
    set_seed(job.seed)
    if job.preferences == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as PairTrainer
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as PairTrainer
    trainer = PairTrainer(
        model=load_quantized(job),
        args=Config(
            output_dir=f"{job.out}-trainer",
            max_length=job.row_tokens,
            beta=0.1,
            per_device_train_batch_size=job.samples_per_step,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            **common(job),
        ),
        train_dataset=Dataset.from_list(pairs(job)),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job),
    )
    trainer.add_callback(TellPairs(trainer.model))
    train_counted(trainer, job)


def pairs(job: TrainingJob) -> list[dict[str, Any]]:
    """The rows, as TRL's conversational format."""
    rows = [json.loads(line) for line in Path(job.rows).read_text().splitlines()]
    return [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]


class TellPairs(TellSteps):
    """Reports after each step how many real tokens have been trained, without those of the reference."""

    def _count(self, model: Any, args: Any, batch: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.tokens += int(batch["attention_mask"].sum())
            self.trained = self.tokens


if __name__ == "__main__":
    main()
