"""Unsloth's fast path under plain ``Trainer``, with one sample per step.

Unsloth packs samples only with flash-attention or xformers, so compare with samples that fill a row each.
Requires ``unsloth``, which patches transformers and peft when it is imported and is therefore imported first.
"""

from __future__ import annotations

import unsloth  # isort: skip  # noqa: F401
import torch
from unsloth import FastLanguageModel

from bench.baselines.hf_trainer import train
from bench.baselines.job import read_job

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train once over the rows."""
    job = read_job()
    model, _ = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=job.row_tokens,
        dtype=getattr(torch, job.dtype),
        load_in_4bit=True,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=_LINEAR,
        bias="none",
        use_gradient_checkpointing="unsloth" if job.checkpointing else False,
        random_state=job.seed,
    )
    # Unsloth uses its own checkpointing.
    train(job, model, gradient_checkpointing=False)


if __name__ == "__main__":
    main()
