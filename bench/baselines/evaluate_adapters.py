"""Validation loss of any adapters, with plain peft, one sample at a time and the model's own loss.

``python -m bench.baselines.evaluate_adapters JOB.json ADAPTER…`` prints one line per adapter, starting with
``base``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from bench.baselines.hf_trainer import load_quantized, tokenized
from bench.baselines.job import conversations, read_job, tell


def main() -> None:
    """Evaluate the base and every named adapter."""
    job = read_job()
    model = load_quantized(job)
    for module in model.modules():
        # Otherwise, bitsandbytes would repack weights for inference on some CPUs, and round differently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = [
        tokenized(messages, tokenizer, job.row_tokens)
        for messages in conversations(replace(job, rows=job.validation))
    ]
    tell("judged", adapter="base", loss=mean_loss(model, rows))
    tuned: Any = None
    for folder in sys.argv[2:]:
        if tuned is None:
            tuned = PeftModel.from_pretrained(model, folder, adapter_name=name_of(folder))
        else:
            tuned.load_adapter(folder, adapter_name=name_of(folder))
        tuned.set_adapter(name_of(folder))
        tell("judged", adapter=folder, loss=mean_loss(tuned, rows))


def mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss over all trained tokens."""
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for row in rows:
            trained = sum(label != -100 for label in row["labels"][1:])
            tensors = {key: torch.tensor([value], device=device) for key, value in row.items()}
            total += float(model(**tensors).loss) * trained
            count += trained
    return total / count


def name_of(folder: str) -> str:
    """Return a name without dots and slashes, which peft does not allow."""
    return json.dumps(folder).translate({ord(c): "_" for c in './"\\'})


if __name__ == "__main__":
    main()
