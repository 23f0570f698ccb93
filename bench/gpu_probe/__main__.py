"""Asks the questions one after another; see :mod:`bench.gpu_probe`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import bench.gpu_probe
from qlora_tui.gpu.library_imports import faster_imports
from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env

# Before torch is imported.
configure_torch_env(allocator_variables(os.environ))

with faster_imports():
    import torch

    from bench.gpu_acceptance import write_report
    from bench.gpu_probe import attention, libraries, steps
    from bench.gpu_probe.probe import Answer, Probe

QUESTIONS: tuple[Callable[[Probe], Answer], ...] = (
    libraries.machine,
    libraries.context,
    attention.new_lengths,
    attention.attention_kernels,
    attention.varlen_attention,
    libraries.triton_kernels,
    libraries.four_bit,
    steps.step_small,
    steps.step_small_kept,
    steps.step_large,
    steps.step_float16,
    steps.step_dora,
    libraries.out_of_memory,
)
_LINE = 1500
"""Characters of an answer that are printed."""


def main() -> int:
    """Ask, print and write; returns 1 where a question failed or was not asked."""
    names = [question.__name__ for question in QUESTIONS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_probe",
        description=bench.gpu_probe.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--models", type=Path, help="folder of the random models, for a later call too")
    parser.add_argument("--out", type=Path, default=Path("gpu_probe.json"))
    parser.add_argument("--seconds", type=float, default=400.0, help="after these no question is begun")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    answers: dict[str, Answer] = {}
    with ExitStack() as stack:
        models = args.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models.mkdir(parents=True, exist_ok=True)
        probe = Probe(torch.cuda.is_available(), models.absolute())
        for question in QUESTIONS:
            if question.__name__ not in args.only:
                continue
            began = time.monotonic()
            answer = {"failed": "out of time"} if began > until else ask(question, probe)
            answers[question.__name__] = answer | {"seconds": round(time.monotonic() - began, 1)}
            write_report(answers, args.out)
            line = json.dumps(answers[question.__name__], default=str)
            print(f"{question.__name__}: {line[:_LINE]}", flush=True)
    return int(any("failed" in answer for answer in answers.values()))


def ask(question: Callable[[Probe], Answer], probe: Probe) -> Answer:
    """Ask one question; whatever it raises is its answer."""
    try:
        return question(probe)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        probe.free_memory()


if __name__ == "__main__":
    sys.exit(main())
