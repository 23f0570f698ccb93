"""``python -m bench.gpu_probe.length_timer``: seconds of attention at lengths that are new to the process.

A separate process for each order of SDPA's kernels: torch reads the environment once. Prints one JSON list.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_probe.probe import Probe, attention_inputs

LENGTHS = range(100, 130, 5)
_WARMUP_LENGTH = 64


def main() -> None:
    """Time forward and backward of each length once."""
    probe = Probe(torch.cuda.is_available(), Path())
    seconds = [_first_call(probe, tokens) for tokens in (_WARMUP_LENGTH, *LENGTHS)]
    print(json.dumps(seconds[1:]))


def _first_call(probe: Probe, tokens: int) -> float:
    query, key, value = attention_inputs(probe, tokens)
    probe.synchronize()
    began = time.perf_counter()
    scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()
    probe.synchronize()
    return round(time.perf_counter() - began, 5)


if __name__ == "__main__":
    main()
