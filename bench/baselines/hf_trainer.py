"""The script most people write: ``Trainer``, one sample at a time, four of them a step.

``prepare_model_for_kbit_training``, ``get_peft_model``, padding to the longest of a batch, the model's own
loss. Prompts are masked, as in the better of such scripts.
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

from bench.baselines.job import Work, conversations, given, steps_of, tell


def main() -> None:
    """Train once over the rows."""
    work = given()
    set_seed(work.seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model = prepare_model_for_kbit_training(
        load_quantized(work), use_gradient_checkpointing=work.checkpointing
    )
    model = get_peft_model(model, lora(work))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{work.out}-trainer",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=work.samples_a_step,
            num_train_epochs=1,
            **common(work),
        ),
        train_dataset=samples(work, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TellSteps(model)],
    )
    start_counting()
    trainer.train()
    tell_peak()
    model.save_pretrained(work.out)


def samples(work: Work, tokenizer: Any) -> list[dict[str, list[int]]]:
    """What is learned from, as the model takes it."""
    if work.batches:
        every = [sample for step in steps_of(work) for sample in step]
        return [sample | {"attention_mask": [1] * len(sample["input_ids"])} for sample in every]
    return [tokenized(messages, tokenizer, work.row_tokens) for messages in conversations(work)]


def load_quantized(work: Work) -> Any:
    """The base model in 4 bits, as its documentation says."""
    dtype = getattr(torch, work.dtype)
    return AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=work.method,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )


def lora(work: Work) -> LoraConfig:
    """All linear modules."""
    return LoraConfig(
        r=work.rank,
        lora_alpha=work.alpha,
        lora_dropout=work.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def common(work: Work) -> dict[str, Any]:
    """Arguments that ``TrainingArguments`` and what is built on it share."""
    return {
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": work.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": work.checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": work.seed,
    }


def tokenized(messages: list[dict[str, str]], tokenizer: Any, limit: int) -> dict[str, list[int]]:
    """Through the chat template, cut at ``limit`` tokens; the prompt is not learnt from."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:limit]
    masked = min(len(prompt["input_ids"]), len(whole))
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "labels": [-100] * masked + whole[masked:],
    }


class TellSteps(TrainerCallback):
    """Tells of each step how many tokens have been learnt from."""

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
    """The model is there; what is held from now on is training's."""
    held = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    tell("loaded", pid=os.getpid(), allocated=held)


def tell_peak() -> None:
    """The most that was allocated on a GPU."""
    if torch.cuda.is_available():
        tell("peak", allocated=torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
