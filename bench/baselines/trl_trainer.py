"""TRL's trainers: ``SFTTrainer`` with packing, or ``DPOTrainer`` and ``ORPOTrainer`` for pairs of answers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from bench.baselines.hf_trainer import TellSteps, common, load_quantized, lora, train_counted
from bench.baselines.job import TrainingJob, conversations, read_job


def main() -> None:
    """Train once over the rows."""
    job = read_job()
    set_seed(job.seed)
    method = job.preferences or "sft"
    module: Any = importlib.import_module("trl.experimental.orpo" if method == "orpo" else "trl")
    config, any_trainer = (getattr(module, method.upper() + kind) for kind in ("Config", "Trainer"))
    rows, settings = (pairs(job), {"beta": 0.1}) if job.preferences else (samples(job), {"packing": True})
    trainer = any_trainer(
        model=load_quantized(job),
        args=config(
            output_dir=f"{job.out}-trainer",
            max_length=job.row_tokens,
            per_device_train_batch_size=job.samples_per_step if job.preferences else 1,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            **settings,
            **common(job),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job),
    )
    trainer.add_callback((TellPairs if job.preferences else TellSteps)(trainer.model))
    train_counted(trainer, job)


def samples(job: TrainingJob) -> list[dict[str, Any]]:
    """Return conversations as TRL's prompts and completions."""
    return [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations(job)]


def pairs(job: TrainingJob) -> list[dict[str, Any]]:
    """Return pairs of answers in TRL's conversational format."""
    rows = [json.loads(line) for line in Path(job.rows).read_text().splitlines()]
    return [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]


class TellPairs(TellSteps):
    """Reports after each step how many tokens have been trained, without padding and the reference."""

    def _count(self, model: Any, args: Any, batch: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.tokens += int(batch["attention_mask"].sum())
            self.trained = self.tokens


if __name__ == "__main__":
    main()
