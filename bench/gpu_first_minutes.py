"""The first five minutes on a GPU: does everything that was prepared without one work here?

    python -m bench.gpu_first_minutes [--out FOLDER]

Asks in this order, each within its own deadline, and prints a verdict for each: ``doctor``; the questions of
:mod:`bench.gpu_probe` about this machine, memory, NF4, Triton's kernels, attention and a full GPU; a run of a
0.5B model with the kernels in use, layers kept and its memory recorded, one in float16, and one that resumes
to the same bits (:mod:`bench.gpu_acceptance`, which has more). The folder has what each of them wrote. Exit
code 1 where something is wrong. On a CPU it is a dry run with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.support.child_processes import (
    adopt_orphans,
    end_descendants_on_sigterm,
    python_module,
    run_within,
)

Result = Literal["ok", "wrong", "skipped"]
_MARKS = {"ok": "✓", "wrong": "✗", "skipped": "–"}
_CHECKS = ("loop", "float16", "resume")
_DRY_RUN_S = 3600.0


@dataclass(frozen=True)
class Verdict:
    """What one question or check showed."""

    name: str
    result: Result
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{_MARKS[self.result]} {self.name:<20} {self.text}"
        return f"{line}\n  {'':<20} ▸ {self.fix}" if self.fix and self.result == "wrong" else line


def doctor_verdicts(report: dict[str, Any]) -> Iterator[Verdict]:
    """Yield what ``doctor --json`` found; what merely could be better is no mistake here."""
    for check in report["checks"]:
        result: Result = "wrong" if check["outcome"] == "error" else "ok"
        yield Verdict(check["name"], result, check["text"], check["fix"])


def probe_verdicts(answers: dict[str, Any]) -> Iterator[Verdict]:
    """Yield what each question of the probe was answered, in a sentence."""
    for name, answer in answers.items():
        text = answer.get("failed") or answer.get("skipped") or _SENTENCES[name](answer)
        yield Verdict(name, _probe_result(name, answer), " ".join(text.split()))


def _machine(answer: dict[str, Any]) -> str:
    """Return what runs here."""
    if not answer["has_gpu"]:
        return f"torch {answer['torch']} sees no GPU"
    grows = "grows" if answer.get("expandable_segments") else "does not grow"
    return (
        f"torch {answer['torch']} with CUDA {answer['cuda']} sees {answer['visible_gpus']} GPU(s), the first "
        f"{answer['gpu']} with driver {answer.get('driver', 'unknown')}; the allocator {grows} its segments"
    )


def _context(answer: dict[str, Any]) -> str:
    """Return what a process takes of the GPU's memory besides its tensors."""
    if not answer["names_process"]:
        return "NVML does not report the memory of this process"
    return (
        f"a process takes {answer['context_mib']} MiB besides its tensors, {answer['with_cublas_mib']} MiB "
        f"with cuBLAS, whose workspace takes {answer['workspace_mib']} MiB of the tensors"
    )


def _triton_kernels(answer: dict[str, Any]) -> str:
    """Return what became of the kernels in each dtype, and how fast a norm is."""
    words = [
        f"used in {dtype}" if (what := answer[dtype]) == "used" else f"refused in {dtype}: {what}"
        for dtype in ("bfloat16", "float16")
    ]
    if "norm_ms" in answer:
        ours, theirs = answer["norm_ms"]
        words.append(f"a norm takes {ours} ms, {theirs} ms in torch")
    return "; ".join(words)


def _four_bit(answer: dict[str, Any]) -> str:
    """Return how NF4 compares with the CPU's, how fast it is, and whether it repeats its products."""
    products = {name: each for name, each in answer.items() if name.endswith(" rows")}
    differ = [name for name, each in products.items() if not each["equal_twice"]]
    repeats = f"products of {', '.join(differ)} are not repeated bit by bit" if differ else "products repeat"
    times = ", ".join(f"{name} in {each['ms']} ms" for name, each in products.items())
    return (
        f"NF4 differs from the CPU's by {answer['difference_from_cpu']:.2g}, unpacks "
        f"{answer['unpack_gb_s']} GB/s; {repeats}: {times}"
    )


def _varlen_attention(answer: dict[str, Any]) -> str:
    """Return how fast packed samples are in one call and one by one."""
    words, refusals = [], {}
    for name, row in answer.items():
        if not name.endswith(" samples"):
            continue
        for kind, how in (("in_one_call", "in one call"), ("by_sample", "one by one")):
            if f"{kind}_ms" in row:
                words.append(f"{name} {how} take {row[f'{kind}_ms']} ms")
            else:
                refusals[how] = row[kind]
    return "; ".join([*words, *(f"refused {how}: {why}" for how, why in refusals.items())])


def _out_of_memory(answer: dict[str, Any]) -> str:
    """Return whether each way to fill the GPU is recognized."""
    cases = {name: each for name, each in answer.items() if name != "seconds"}
    return "; ".join(
        f"a {name} on a full GPU raises {each['type']}, {'' if each['recognized'] else 'not '}recognized"
        for name, each in cases.items()
    )


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "machine": _machine,
    "context": _context,
    "triton_kernels": _triton_kernels,
    "four_bit": _four_bit,
    "varlen_attention": _varlen_attention,
    "out_of_memory": _out_of_memory,
}
"""The sentence of each question, from the fields of its answer."""


def _probe_result(name: str, answer: dict[str, Any]) -> Result:
    if "skipped" in answer:
        return "skipped"
    if name == "machine" and "failed" not in answer:
        return "ok" if answer["has_gpu"] else "skipped"
    if name == "triton_kernels":
        return "ok" if "failed" not in answer and answer["bfloat16"] == "used" else "wrong"
    if name == "out_of_memory" and "failed" not in answer:
        return (
            "ok" if all(each["recognized"] for key, each in answer.items() if key != "seconds") else "wrong"
        )
    return "wrong" if "failed" in answer else "ok"


def acceptance_verdicts(report: dict[str, Any]) -> Iterator[Verdict]:
    """Yield the outcome of each check of the acceptance."""
    for name, check in report["checks"].items():
        result: Result = check["result"] if check["result"] in ("ok", "skipped") else "wrong"
        log = check["figures"].get("log", "").strip().splitlines()
        yield Verdict(name, result, check["summary"], log[-1] if log else "")


_STEPS: tuple[tuple[str, float, Any], ...] = (
    # The self-test trains twice, and Triton may compile from a cold disk.
    ("doctor", 180, doctor_verdicts),
    ("probe", 150, probe_verdicts),
    ("acceptance", 300, acceptance_verdicts),
)
"""Name, deadline in seconds, and reader of what it wrote."""


def commands(folder: Path, *, size: str) -> dict[str, list[str]]:
    """Return the command of each step; all but doctor write their report to ``<step>.json``."""
    probe = ("--only", *_SENTENCES, "--models", folder / "models", "--out", folder / "probe.json")
    acceptance = ("--size", size, "--model", folder / "models" / size, "--only", *_CHECKS)
    seconds = _DRY_RUN_S if size == "tiny" else 290
    return {
        "doctor": python_module("qlora_tui", "doctor", "--json"),
        "probe": python_module("bench.gpu_probe", *probe),
        "acceptance": python_module(
            "bench.gpu_acceptance", *acceptance, "--seconds", seconds, "--out", folder / "acceptance.json"
        ),
    }


def main() -> int:
    """Take each step and print its verdicts; return 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the reports; default: a new one in /tmp")
    parser.add_argument("--size", choices=("0.5b", "tiny"), default="0.5b", help="tiny: a dry run on a CPU")
    args = parser.parse_args()
    folder = (args.out or Path(tempfile.mkdtemp(prefix="gpu-first-minutes-"))).absolute()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    end_descendants_on_sigterm()
    verdicts: list[Verdict] = []
    dry = args.size == "tiny"
    for name, seconds, read in _STEPS:
        began = time.monotonic()
        log, report = folder / f"{name}.log", folder / f"{name}.json"
        code = run_within(_DRY_RUN_S if dry else seconds, commands(folder, size=args.size)[name], log=log)
        print(f"── {name}, {time.monotonic() - began:.0f} s", flush=True)
        text = log.read_text(errors="replace") if name == "doctor" else ""
        try:
            answers = json.loads(text[text.index("{") :] if text else report.read_text())
            step_verdicts = list(read(answers))
        except (OSError, ValueError, KeyError):
            last = (log.read_text(errors="replace").strip().splitlines() or ["It printed nothing."])[-1]
            ended = f"ended with code {code}" if code is not None else f"took over {seconds:.0f} s"
            step_verdicts = [Verdict(name, "wrong", f"{ended}: {last}", f"See {log}")]
        print(*step_verdicts, sep="\n", flush=True)
        verdicts += step_verdicts
    if not dry and not any(verdict.name == "machine" and verdict.result == "ok" for verdict in verdicts):
        verdicts.append(Verdict("a GPU", "wrong", "torch sees none", "qlora-tui doctor says why"))
        print(verdicts[-1])
    wrong = [verdict.name for verdict in verdicts if verdict.result == "wrong"]
    print(f"\nReports: {folder}")
    print(f"Wrong: {', '.join(wrong)}." if wrong else "Everything that was asked works on this machine.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
