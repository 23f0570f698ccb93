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
from collections.abc import Iterator
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
_QUESTIONS = ("machine", "context", "triton_kernels", "four_bit", "varlen_attention", "out_of_memory")
_CHECKS = ("loop", "float16", "resume")
_DRY_RUN_S = 3600.0
_LINE = 110
"""Characters of a verdict."""


@dataclass(frozen=True)
class Verdict:
    """What one question or check showed."""

    name: str
    result: Result
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{_MARKS[self.result]} {self.name:<20} {self.text[:_LINE]}"
        return f"{line}\n  {'':<20} ▸ {self.fix}" if self.fix and self.result == "wrong" else line


def doctor_verdicts(report: dict[str, Any]) -> Iterator[Verdict]:
    """Yield what ``doctor --json`` found; what merely could be better is no mistake here."""
    for check in report["checks"]:
        result: Result = "wrong" if check["outcome"] == "error" else "ok"
        yield Verdict(check["name"], result, check["text"], check["fix"])


def probe_verdicts(answers: dict[str, Any]) -> Iterator[Verdict]:
    """Yield what each question of the probe was answered."""
    for name, answer in answers.items():
        facts = ", ".join(f"{key} {value}" for key, value in answer.items() if key != "seconds")
        yield Verdict(name, _probe_result(name, answer), answer.get("failed") or facts)


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
    ("doctor", 90, doctor_verdicts),
    ("probe", 150, probe_verdicts),
    ("acceptance", 300, acceptance_verdicts),
)
"""Name, deadline in seconds, and reader of what it wrote."""


def commands(folder: Path, *, size: str) -> dict[str, list[str]]:
    """Return the command of each step; all but doctor write their report to ``<step>.json``."""
    probe = ("--only", *_QUESTIONS, "--models", folder / "models", "--out", folder / "probe.json")
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
