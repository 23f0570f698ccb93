"""Unsloth's fast path under plain ``Trainer``, one sample a step.

Unsloth packs samples only with flash-attention or xformers: compare where every sample fills a row. Needs
``unsloth``, which patches transformers and peft when it is imported, so it comes first.
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
    # Its checkpointing is Unsloth's own.
    train(job, model, gradient_checkpointing=False)


if __name__ == "__main__":
    main()
