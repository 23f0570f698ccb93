"""A hand-written training loop: transformers and peft, one sample per pass, nothing fused.

``python -m bench.baselines.step_by_step JOB.json`` trains on the steps of ``job.batches``. A step sums the
gradients of its samples, with losses weighted by token. Loss and attention are transformers' defaults.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from bench.baselines.job import TrainingJob, read_job, steps_of, tell

Sample = dict[str, list[int]]


def main() -> None:
    """Train once over the steps."""
    job = read_job()
    model = adapted(job)
    steps = steps_of(job)
    tell(
        "loaded", pid=os.getpid(), allocated=torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    )
    tokens = trained = 0
    for samples, (loss, grad_norm) in zip(steps, train(model, steps, job), strict=True):
        at = time.time()
        tokens += sum(len(sample["input_ids"]) for sample in samples)
        trained += predictions(samples)
        tell("step", tokens=tokens, trained=trained, loss=loss, grad_norm=grad_norm, at=at)
    if torch.cuda.is_available():
        tell("peak", allocated=torch.cuda.max_memory_allocated())
    model.save_pretrained(job.out)


def adapted(job: TrainingJob) -> Any:
    """Return the base model in 4 bits with a new adapter on every linear module."""
    dtype = getattr(torch, job.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=job.method,
            bnb_4bit_use_double_quant=job.double,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    model.config.use_cache = False
    set_seed(job.seed)
    config = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # Switch to training mode before the first forward: in eval mode, bitsandbytes repacks 4-bit weights on
    # some CPUs, and then computes wrong gradients.
    return get_peft_model(model, config).train()


def train(model: Any, steps: list[list[Sample]], job: TrainingJob) -> Iterator[tuple[float, float]]:
    """Train, and yield loss and gradient norm before clipping after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    device = parameters[0].device
    for number, samples in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate * share_of_rate(job, number, len(steps))
        count = predictions(samples)
        total = 0.0
        for sample in samples:
            inputs = {name: torch.tensor([values], device=device) for name, values in sample.items()}
            loss = model(**inputs, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        yield total, grad_norm


def predictions(samples: list[Sample]) -> int:
    """Return the number of trained tokens. The first token of a sample is not predicted."""
    return sum(label != -100 for sample in samples for label in sample["labels"][1:])


def share_of_rate(job: TrainingJob, step: int, steps: int) -> float:
    """Return the share of the learning rate at ``step``, counted from 0.

    A linear warm-up, which does not begin at zero, is followed by a constant rate or half a cosine.
    """
    warmup = math.ceil(job.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if job.lr_scheduler == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


if __name__ == "__main__":
    main()
