"""Score the memory estimate against published measurements of transformers and peft.

    python -m bench.estimator [--csv TABLE ...] [--configs FOLDER] [--json]

Without arguments it scores ``tests/memory/measured.csv`` with the configs in ``tests/configs``. A table has
a row a measurement: ``model_id, quant, double_quant, batch, seq_len, lora_r, targets, grad_ckpt, optimizer,
attention, extra, gpu, measured_gb, unit, measure``; ``measure`` says which tier ``measured_gb`` is.
``--configs`` holds ``<org>__<name>/config.json`` or ``<org>__<name>.json``. Which code a row ran is read from
its own words by :mod:`bench.published_rows`; a row whose code is not modeled is listed with the reason, never
with a figure.

A row that ran out of memory has no figure: there the process tier is compared with the GPU, and so it is for
the rows that ran. Where ``extra`` gives what the allocator reserved or the process held beside what was
allocated (``peak_reserved_MiB``, ``process_MiB``, ``nvidia_smi_MiB``), those tiers are scored too.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.published_rows import Row, Unplaced, find_config, read_execution
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import load_config, parse_architecture
from qlora_tui.errors import UserError
from qlora_tui.memory import Estimate, check_fit, estimate

UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
TESTS = Path(__file__).parents[1] / "tests"
UNDER_PCT = -3.0
"""An estimate that is lower than this is counted: a run that was said to fit may not."""


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
    process_bytes: int
    phase: str
    capacity_bytes: int | None
    verdict: str | None
    tier_errors: dict[str, float]
    """In percent, by tier, where the row gives it."""

    @property
    def error_pct(self) -> float | None:
        """Relative error in percent; positive is over."""
        return _percent(self.ours_bytes, self.measured_bytes) if self.measured_bytes else None

    @property
    def exceeds_gpu_memory(self) -> bool | None:
        """Whether the estimate says that the run goes out of memory; None without the GPU's size."""
        return None if self.capacity_bytes is None else self.process_bytes > self.capacity_bytes


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
    matches = {tier: re.search(pattern, row["extra"].lower()) for tier, pattern in MEASURED_TIERS.items()}
    return {tier: float(match[1]) * 2**20 for tier, match in matches.items() if match}


def score(row: Row, architecture: Architecture) -> Score:
    """Estimate one row. Raises Unplaced or UserError."""
    recipe, execution = read_execution(row)
    capacity, tiers = _capacity(row["gpu"]), measured_tiers(row)
    estimated = estimate(recipe, architecture, execution=execution, capacity_bytes=capacity)
    measured = None
    if not _ran_out(row):
        measured = int(float(row["measured_gb"].replace(",", "")) * UNITS[row["unit"].strip().lower()])
    return Score(
        id=row["id"],
        model=row["model_id"],
        path=execution.name,
        measure=row["measure"],
        measured_bytes=measured,
        ours_bytes=_tier(estimated, row["measure"]),
        process_bytes=estimated.process_bytes,
        phase=estimated.peak_phase,
        capacity_bytes=capacity,
        verdict=None if capacity is None else check_fit(estimated, capacity).word,
        tier_errors={tier: _percent(_tier(estimated, tier), bytes_) for tier, bytes_ in tiers.items()},
    )


def _tier(estimated: Estimate, measure: str) -> int:
    word = measure.lower()
    if "reserved" in word:
        return estimated.reserved_bytes
    if "process" in word or "smi" in word or "nvml" in word:
        return estimated.process_bytes
    return estimated.allocated_bytes


def _capacity(gpu: str) -> int | None:
    match = re.search(r"(\d+)\s*GB", gpu)
    return int(match[1]) * 2**30 if match else None


def run(tables: Path | Sequence[Path], configs: Path) -> dict[str, Any]:
    """Score whole tables; the JSON that ``--json`` prints."""
    scores: list[Score] = []
    unplaced: list[dict[str, str]] = []
    for row in _read_tables([tables] if isinstance(tables, Path) else tables):
        try:
            config = find_config(row["model_id"], configs)
            scores.append(score(row, parse_architecture(load_config(config))))
        except (Unplaced, UserError, KeyError, ValueError) as reason:
            unplaced.append({"id": row.get("id", "?"), "model": row.get("model_id", "?"), "why": str(reason)})
    return {
        "rows": [_row(scored) for scored in scores],
        "summary": _summary(scored.error_pct for scored in scores),
        "by_path": _by_path(scores),
        "by_tier": _by_tier(scores),
        "out_of_memory": [_out_of_memory(scored) for scored in scores if scored.measured_bytes is None],
        "ran_but_said_not_to_fit": [
            scored.id for scored in scores if scored.measured_bytes is not None and scored.exceeds_gpu_memory
        ],
        "unplaced": unplaced,
    }


def _read_tables(tables: Sequence[Path]) -> Iterable[Row]:
    for table in tables:
        with table.open(newline="") as file:
            yield from csv.DictReader(file)


def _row(scored: Score) -> dict[str, Any]:
    return {
        "id": scored.id,
        "model": scored.model,
        "path": scored.path,
        "measure": scored.measure,
        "measured_bytes": scored.measured_bytes,
        "ours_bytes": scored.ours_bytes,
        "peak_phase": scored.phase,
        "error_pct": scored.error_pct,
        "tier_error_pct": scored.tier_errors,
    }


def _out_of_memory(scored: Score) -> dict[str, Any]:
    return {
        "id": scored.id,
        "model": scored.model,
        "ours_bytes": scored.ours_bytes,
        "process_bytes": scored.process_bytes,
        "said_it_would_not_fit": scored.exceeds_gpu_memory,
        "verdict": scored.verdict,
    }


def _summary(errors: Iterable[float | None]) -> dict[str, Any]:
    """Mean of the absolute errors, their bias (the signed mean), the worst over and under, in percent."""
    known = [error for error in errors if error is not None]
    if not known:
        nothing = ("mean_pct", "bias_pct", "worst_over_pct", "worst_under_pct")
        return {"rows": 0, **dict.fromkeys(nothing), "under_by_more_than_3_pct": 0}
    return {
        "rows": len(known),
        "mean_pct": sum(abs(error) for error in known) / len(known),
        "bias_pct": sum(known) / len(known),
        "under_by_more_than_3_pct": sum(error < UNDER_PCT for error in known),
        "worst_over_pct": max(0.0, *known),
        "worst_under_pct": min(0.0, *known),
    }


def _by_path(scores: list[Score]) -> dict[str, Any]:
    paths = dict.fromkeys(each.path for each in scores)
    return {path: _summary(scored.error_pct for scored in scores if scored.path == path) for path in paths}


def _by_tier(scores: list[Score]) -> dict[str, Any]:
    return {tier: _summary(each.tier_errors.get(tier) for each in scores) for tier in MEASURED_TIERS}


def _print(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["measured_bytes"] is None:
            continue
        print(
            f"{row['id']:6}{row['model'][-28:]:29}{row['measured_bytes'] / 2**30:8.3f} GiB"
            f"{row['ours_bytes'] / 2**30:9.3f}{row['error_pct']:+8.2f} %   "
            f"{row['peak_phase']:24}"
            + "  ".join(f"{tier} {error:+.1f}" for tier, error in row["tier_error_pct"].items())
        )
    print("\nby the code that ran")
    for path, figures in result["by_path"].items():
        print(f"  {_figures(figures)}  {path[:70]}")
    print("\nby tier, where a row gives it")
    for tier, figures in result["by_tier"].items():
        print(f"  {_figures(figures)}  {tier}")
    print(f"\nin all\n  {_figures(result['summary'])}")
    failed_rows = result["out_of_memory"]
    predicted = sum(bool(row["said_it_would_not_fit"]) for row in failed_rows)
    fits = sum(row["verdict"] in ("fits", "tight") for row in failed_rows)
    false_alarms = len(result["ran_but_said_not_to_fit"])
    print(f"\nout of memory: {predicted} of {len(failed_rows)} predicted, {fits} said to fit")
    print(f"ran, but predicted to go out of memory: {false_alarms}")
    print(f"\nnot modeled: {len(result['unplaced'])} rows")
    for row in result["unplaced"]:
        print(f"  {row['id']} {row['model']}: {row['why'].splitlines()[0]}")


def _figures(figures: dict[str, Any]) -> str:
    if not figures["rows"]:
        return f"{0:3} rows" + " " * 77
    return (
        f"{figures['rows']:3} rows  mean {figures['mean_pct']:6.2f} %  bias {figures['bias_pct']:+7.2f} %"
        f"  worst over {figures['worst_over_pct']:+7.2f} %  under {figures['worst_under_pct']:+7.2f} %"
        f"  under by > 3 %: {figures['under_by_more_than_3_pct']}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score the memory estimate against measurements.")
    parser.add_argument("--csv", type=Path, nargs="+", default=[TESTS / "memory" / "measured.csv"])
    parser.add_argument("--configs", type=Path, default=TESTS / "configs")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = run(given.csv, given.configs)
    if given.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result)


if __name__ == "__main__":
    main()
