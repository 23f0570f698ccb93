"""Score the memory estimate against published measurements, beside three other ways to estimate.

    python -m bench.estimator --csv measured.csv --configs model-configs [--json]

The table has a row a measurement: ``model_id, quant, double_quant, batch, seq_len, lora_r, targets,
grad_ckpt, optimizer, attention, extra, gpu, measured_gb, unit, measure``. ``--configs`` holds
``<org>__<name>/config.json``. Which code a row ran is read from its own words by :mod:`bench.published_rows`;
a row that cannot be placed is listed with the reason. A row that ran out of memory has no figure:
there the verdict is scored against the card. Where ``extra`` gives what the allocator reserved or the process
held beside what was allocated (``peak_reserved_MiB``, ``process_MiB``, ``nvidia_smi_MiB``), those tiers are
scored too.

Baselines: ``fitcheck-llm`` 0.3.1 in ``.bench-venv`` (``make bench-deps``), fed the same config;
``accelerate estimate-memory``'s rule for Adam (the largest of weights, weights and gradients, and four
times the weights in training, at the row's precision); and half a byte a parameter plus 1.5 GB.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fitcheck import Answer, ask, question
from bench.published_rows import Row, Unplaced, find_config, read_path
from qlora_tui.catalog.architecture import load_config, read_architecture
from qlora_tui.catalog.facts import Architecture
from qlora_tui.errors import Problem
from qlora_tui.memory import Estimate, estimate, judge

UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Score:
    """One row, estimated."""

    id: str
    model: str
    path: str
    measure: str
    measured_bytes: int | None
    """None where the run went out of memory."""
    ours_bytes: int
    fitcheck_bytes: int | None
    accelerate_bytes: int
    half_byte_bytes: int
    phase: str
    capacity_bytes: int | None
    verdict: str | None
    tier_errors: dict[str, float]
    """In percent, by tier, where the row gives it."""
    fitcheck_process_error: float | None

    def error(self, predicted: int | None) -> float | None:
        """Relative error in percent; positive is over."""
        if predicted is None or not self.measured_bytes:
            return None
        return _percent(predicted, self.measured_bytes)


def _percent(predicted: float, measured: float) -> float:
    return 100 * (predicted - measured) / measured


MEASURED_TIERS = {
    "reserved": r"peak_reserved_mib=([\d.]+)",
    "process": r"process_mib=([\d.]+)",
    "process (nvidia-smi)": r"nvidia_smi_mib=([\d.]+)",
}


def _ran_out(row: Row) -> bool:
    return row["measured_gb"].strip().lower() in ("oom", "out of memory")


def measured_tiers(row: Row) -> dict[str, float]:
    """What ``extra`` gives beside the measure, in bytes; of a run that went out of memory it says nothing."""
    if _ran_out(row):
        return {}
    found = {tier: re.search(pattern, row["extra"].lower()) for tier, pattern in MEASURED_TIERS.items()}
    return {tier: float(match[1]) * 2**20 for tier, match in found.items() if match}


def score(row: Row, architecture: Architecture, fitcheck: Answer | None) -> Score:
    """Estimate one row. Raises Unplaced or Problem."""
    recipe, path = read_path(row)
    made = estimate(recipe, architecture, path=path)
    measured = None
    if not _ran_out(row):
        measured = int(float(row["measured_gb"].replace(",", "")) * UNITS[row["unit"].strip().lower()])
    width = 4 if path.compute_bytes == 4 else 2
    capacity, tiers = _capacity(row["gpu"]), measured_tiers(row)
    theirs = fitcheck and tiers.get("process") and _percent(fitcheck[1], tiers["process"])
    return Score(
        id=row["id"],
        model=row["model_id"],
        path=path.name,
        measure=row["measure"],
        measured_bytes=measured,
        ours_bytes=_tier(made, row["measure"]),
        fitcheck_bytes=fitcheck and fitcheck[0],
        accelerate_bytes=architecture.total_params * width * 4,
        half_byte_bytes=architecture.total_params // 2 + 1_500_000_000,
        phase=made.peak_phase,
        capacity_bytes=capacity,
        verdict=None if capacity is None else judge(made, capacity).word,
        tier_errors={tier: _percent(_tier(made, tier), bytes_) for tier, bytes_ in tiers.items()},
        fitcheck_process_error=theirs,
    )


def _tier(made: Estimate, measure: str) -> int:
    word = measure.lower()
    if "reserved" in word:
        return made.reserved_bytes
    if "process" in word or "smi" in word or "nvml" in word:
        return made.process_bytes
    return made.allocated_bytes


def _capacity(gpu: str) -> int | None:
    found = re.search(r"(\d+)\s*GB", gpu)
    return int(found[1]) * 2**30 if found else None


def run(table: Path, configs: Path, fitcheck: Path) -> dict[str, Any]:
    """Score a whole table; the JSON that ``--json`` prints."""
    placed: list[tuple[Row, Path, Architecture]] = []
    unplaced: list[dict[str, str]] = []
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                config = find_config(row["model_id"], configs)
                read_path(row)
                placed.append((row, config, read_architecture(load_config(config))))
            except (Unplaced, Problem, KeyError, ValueError) as reason:
                unplaced.append(
                    {"id": row.get("id", "?"), "model": row.get("model_id", "?"), "why": str(reason)}
                )
    answers = ask([question(row, config) for row, config, _ in placed], fitcheck)
    scores: list[Score] = []
    for (row, _, architecture), answer in zip(placed, answers, strict=True):
        try:
            scores.append(score(row, architecture, answer))
        except (Unplaced, Problem, KeyError, ValueError) as reason:
            unplaced.append({"id": row["id"], "model": row["model_id"], "why": str(reason)})
    return {
        "rows": [_row(made) for made in scores],
        "summary": {name: summary(scores, name) for name in ("ours", "fitcheck", "accelerate", "half_byte")},
        "by_path": _by_path(scores),
        "by_tier": _by_tier(scores),
        "out_of_memory": [_out_of_memory(made) for made in scores if made.measured_bytes is None],
        "unplaced": unplaced,
    }


def _row(made: Score) -> dict[str, Any]:
    return {
        "id": made.id,
        "model": made.model,
        "path": made.path,
        "measure": made.measure,
        "measured_bytes": made.measured_bytes,
        "ours_bytes": made.ours_bytes,
        "peak_phase": made.phase,
        "error_pct": made.error(made.ours_bytes),
        "fitcheck_error_pct": made.error(made.fitcheck_bytes),
        "accelerate_error_pct": made.error(made.accelerate_bytes),
        "half_byte_error_pct": made.error(made.half_byte_bytes),
        "tier_error_pct": made.tier_errors,
        "fitcheck_process_error_pct": made.fitcheck_process_error,
    }


def _out_of_memory(made: Score) -> dict[str, Any]:
    says = None if made.capacity_bytes is None else made.ours_bytes > made.capacity_bytes
    return {
        "id": made.id,
        "model": made.model,
        "ours_bytes": made.ours_bytes,
        "said_it_would_not_fit": says,
        "verdict": made.verdict,
    }


def summary(scores: Iterable[Score], name: str) -> dict[str, Any]:
    """Mean of the absolute errors, the worst over and the worst under, in percent."""
    return _summary([made.error(getattr(made, f"{name}_bytes")) for made in scores])


def _summary(errors: Iterable[float | None]) -> dict[str, Any]:
    known = [error for error in errors if error is not None]
    if not known:
        return {"rows": 0, "mean_pct": None, "worst_over_pct": None, "worst_under_pct": None}
    return {
        "rows": len(known),
        "mean_pct": sum(abs(error) for error in known) / len(known),
        "worst_over_pct": max(0.0, *known),
        "worst_under_pct": min(0.0, *known),
    }


def _by_path(scores: list[Score]) -> dict[str, Any]:
    paths = dict.fromkeys(made.path for made in scores)
    return {path: summary([made for made in scores if made.path == path], "ours") for path in paths}


def _by_tier(scores: list[Score]) -> dict[str, Any]:
    found = {tier: _summary(made.tier_errors.get(tier) for made in scores) for tier in MEASURED_TIERS}
    found["process, as fitcheck says"] = _summary(made.fitcheck_process_error for made in scores)
    return found


def _print(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["measured_bytes"] is None:
            continue
        others = "  ".join(
            f"{'—' if row[key] is None else format(row[key], '+.1f'):>7}"
            for key in ("fitcheck_error_pct", "accelerate_error_pct", "half_byte_error_pct")
        )
        print(
            f"{row['id']:6}{row['model'][-28:]:29}{row['measured_bytes'] / 2**30:8.3f} GiB"
            f"{row['ours_bytes'] / 2**30:9.3f}{row['error_pct']:+8.2f} %   {others}   {row['peak_phase']:24}"
            + "  ".join(f"{tier} {error:+.1f}" for tier, error in row["tier_error_pct"].items())
        )
    print("\nby path")
    for path, figures in result["by_path"].items():
        print(f"  {_figures(figures)}  {path[:70]}")
    print("\nby tier, where a row gives it")
    for tier, figures in result["by_tier"].items():
        print(f"  {_figures(figures)}  {tier}")
    print("\nin all")
    for name, figures in result["summary"].items():
        print(f"  {_figures(figures)}  {name.replace('_', ' ')}")
    told = [row for row in result["out_of_memory"] if row["said_it_would_not_fit"]]
    fits = [row for row in result["out_of_memory"] if row["verdict"] in ("fits", "tight")]
    print(f"\nout of memory: {len(told)} of {len(result['out_of_memory'])} told, {len(fits)} said to fit")
    for row in result["unplaced"]:
        print(f"not placed: {row['id']} {row['model']}: {row['why'].splitlines()[0]}")


def _figures(figures: dict[str, Any]) -> str:
    if not figures["rows"]:
        return f"{0:3} rows" + " " * 44
    return (
        f"{figures['rows']:3} rows  mean {figures['mean_pct']:6.2f} %"
        f"  worst over {figures['worst_over_pct']:+8.2f} %  under {figures['worst_under_pct']:+7.2f} %"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score the memory estimate against measurements.")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--fitcheck", type=Path, default=Path(".bench-venv/bin/python"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = run(given.csv, given.configs, given.fitcheck)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)


if __name__ == "__main__":
    main()
