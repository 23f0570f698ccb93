"""How fast the step could be if nothing but its matrix products took time.

Every linear module of the model forward (Y = X·Wᵀ) and backward (dX = dY·W; frozen weights take no gradient
of their own), over the tokens of one packed sequence; the head over half of them. Prints ``tokens_per_s``.
"""

from __future__ import annotations

import statistics
import time

import torch

from bench.baselines.job import read_job, tell
from qlora_tui.catalog.local_models import resolve_model

_REPEATS = 3


def main() -> None:
    """Measure each shape once, and add up."""
    job = read_job()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job.dtype)
    shapes: dict[tuple[int, int, int], int] = {}
    architecture = resolve_model(job.model).architecture
    for module in architecture.modules:
        key = (job.row_tokens, module.in_features, module.out_features)
        shapes[key] = shapes.get(key, 0) + 1
    shapes[(job.row_tokens // 2, architecture.hidden_size, architecture.vocab_size)] = 1
    total = sum(count * seconds(*shape, dtype=dtype, device=device) for shape, count in shapes.items())
    tell("limit", tokens_per_s=job.row_tokens / total)


def seconds(tokens: int, inputs: int, outputs: int, *, dtype: torch.dtype, device: str) -> float:
    """Of one module's two products, the median of some repeats."""
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    taken = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        y = x @ weight.T
        y @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
