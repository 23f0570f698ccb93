"""A typical training script: ``Trainer`` with one sample per pass and four samples per step.

It uses ``prepare_model_for_kbit_training``, ``get_peft_model``, padding to the longest sample of a batch, and
the model's own loss. Prompts are masked, as in the better scripts of this kind.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bench.baselines.job import TrainingJob, conversations, read_job, steps_of, tell


def main() -> None:
    """Train once over the rows."""
    job = read_job()
    set_seed(job.seed)
    model = prepare_model_for_kbit_training(load_quantized(job), use_gradient_checkpointing=job.checkpointing)
    train(job, get_peft_model(model, lora(job)))


def train(job: TrainingJob, model: Any, **changes: Any) -> None:
    """Train on padded sequences of one sample each. ``changes`` are passed to ``TrainingArguments``."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{job.out}-trainer",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=job.samples_per_step,
            num_train_epochs=1,
            **(common(job) | changes),
        ),
        train_dataset=samples(job, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TellSteps(model)],
    )
    train_counted(trainer, job)


def train_counted(trainer: Trainer, job: TrainingJob) -> None:
    """Train, report the memory that training takes, and save the adapter."""
    start_counting()
    trainer.train()
    tell_peak()
    model: Any = trainer.model
    model.save_pretrained(job.out)


def samples(job: TrainingJob, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the training samples in the model's format."""
    if job.batches:
        every = [sample for step in steps_of(job) for sample in step]
        return [sample | {"attention_mask": [1] * len(sample["input_ids"])} for sample in every]
    return [tokenized(messages, tokenizer, job.row_tokens) for messages in conversations(job)]


def load_quantized(job: TrainingJob) -> Any:
    """Return the base model in 4 bits, loaded as its documentation says."""
    dtype = getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=job.method,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )


def lora(job: TrainingJob) -> LoraConfig:
    """Return a LoRA config for all linear modules."""
    return LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def common(job: TrainingJob) -> dict[str, Any]:
    """Return arguments that ``TrainingArguments`` and classes derived from it share."""
    return {
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": job.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }


def tokenized(messages: list[dict[str, str]], tokenizer: Any, limit: int) -> dict[str, list[int]]:
    """Return a conversation in token ids, truncated to ``limit`` tokens, with no loss on the prompt."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:limit]
    masked = min(len(prompt["input_ids"]), len(whole))
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "labels": [-100] * masked + whole[masked:],
    }


class TellSteps(TrainerCallback):
    """Reports after each step how many tokens have been trained."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self.trained = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, batch: dict[str, Any]) -> None:
        mask = batch.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        self.trained += int((batch["labels"][:, 1:] != -100).sum())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            tell("step", tokens=self.tokens, trained=self.trained, loss=logs["loss"])


def start_counting() -> None:
    """Report that the model is loaded, and reset the memory peak, so that it only includes training."""
    held = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    tell("loaded", pid=os.getpid(), allocated=held)


def tell_peak() -> None:
    """Report the peak of allocated memory on a GPU."""
    if torch.cuda.is_available():
        tell("peak", allocated=torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
