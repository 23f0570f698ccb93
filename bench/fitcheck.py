"""The estimate of ``fitcheck-llm`` for a row, in a separate environment (``make bench-deps``)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.published_rows import Row, read_execution

Answer = tuple[int, int]
"""Bytes of tensors, and of the process."""


def ask(questions: list[dict[str, Any]], python: Path) -> list[Answer | None]:
    """One answer a question; None where it declines."""
    if not questions or not python.exists():
        return [None] * len(questions)
    request = json.dumps(questions)
    done = subprocess.run([python, "-c", _ASK], input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"fitcheck-llm failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return [None] * len(questions)
    return [answer and (answer[0], answer[1]) for answer in json.loads(done.stdout)]


_ASK = """
import json, sys, types
from unittest import mock
from fitcheck import config_parser
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import get_gpu
answers = []
for question in json.load(sys.stdin):
    try:
        with mock.patch.object(config_parser, "hf_hub_download", lambda **_: question["config"]), \\
             mock.patch.object(config_parser, "_reported_param_count", lambda *a, **k: None):
            model = config_parser.fetch_model_config(question["model"])
        gpu = get_gpu(question["gpu"]) if question["gpu"] else get_gpu(vram_mib=200_000)
        report = estimate(model, TrainingConfig(**question["training"]), gpu)
        answers.append([int((report.total_mib - report.overhead_mib) * 2**20), int(report.total_mib * 2**20)])
    except Exception as error:
        print(question["model"], repr(error), file=sys.stderr)
        answers.append(None)
print(json.dumps(answers))
"""


def question(row: Row, config: Path) -> dict[str, Any]:
    """A row in its words. The GPU is named where it has a profile of it: the overhead depends on that."""
    recipe, execution = read_execution(row)
    method = recipe.quantization.method
    return {
        "config": str(config),
        "model": row["model_id"],
        "gpu": "t4" if "T4" in row["gpu"] else None,
        "training": {
            "precision": "fp16" if execution.float16 else "bf16",
            "quantization": method,
            "double_quant": recipe.quantization.double_quantization and method == "nf4",
            "optimizer": "adam8bit" if "8bit" in execution.optimizer else "adamw",
            "batch_size": recipe.training.micro_batch_size,
            "seq_len": recipe.data.max_length,
            "lora_rank": recipe.lora.rank,
            "lora_targets": list(recipe.lora.target_modules),
            "grad_checkpoint": execution.checkpointing,
            "flash_attn": execution.attention != "eager",
        },
    }
