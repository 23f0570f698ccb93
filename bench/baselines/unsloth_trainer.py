"""Unsloth's fast path under plain ``Trainer``, one sample a step.

Unsloth packs samples only with flash-attention or xformers: compare where every sample fills a row. Needs
``unsloth``, which patches transformers and peft when it is imported, so it comes first.
"""

from __future__ import annotations

import unsloth  # isort: skip  # noqa: F401
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from unsloth import FastLanguageModel

from bench.baselines.hf_trainer import TellSteps, common, samples, start_counting, tell_peak
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
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{job.out}-trainer",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=job.samples_per_step,
            num_train_epochs=1,
            # Its checkpointing is Unsloth's own.
            **(common(job) | {"gradient_checkpointing": False}),
        ),
        train_dataset=samples(job, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TellSteps(model)],
    )
    start_counting()
    trainer.train()
    tell_peak()
    model.save_pretrained(job.out)


if __name__ == "__main__":
    main()
