"""``runs check``: whether every run is intact, one line each, and what was repaired."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_tui.cli.subcommand import CommandResult, format_table
from qlora_tui.errors import EXIT_FAILURE
from qlora_tui.runs.check import CheckResult, apply_repairs, check_leftovers, check_queue, check_run
from qlora_tui.runs.directory import RunDir, all_runs


def check(run: RunDir | None, *, repair: bool) -> CommandResult:
    """Check one run, or all runs, the queue and leftovers; with ``repair``, repair what can be repaired."""
    checks: list[Callable[[], CheckResult]] = [
        partial(check_run, each) for each in ([run] if run else all_runs())
    ]
    if run is None:
        checks += [check_queue, check_leftovers]
    lines, results, problems, repairable = [], [], 0, 0
    for run_check in checks:
        result, repairs = run_check(), list[str]()
        if repair:
            result, repairs = apply_repairs(result, run_check)
        problems += len(result.defects)
        repairable += sum(defect.repair is not None for defect in result.defects)
        results.append(_as_data(result, repairs))
        if result.state is not None or result.defects or repairs:
            lines.append([result.name, result.state or "", _format_result(result, repairs)])
    text = format_table(lines, ["run", "state", "check"]) if lines else "No runs yet."
    if problems:
        count = f"{problems} {'problem' if problems == 1 else 'problems'}"
        hint = (
            ""
            if repair or not repairable
            else " `qlora-tui runs check --repair` repairs them where possible."
        )
        text += f"\n{count}.{hint}"
    data = {"runs": [r for r in results if r["state"]], "problems": problems}
    data |= {str(r["run"]): r for r in results if not r["state"]}
    return CommandResult(data=data, text=text, exit_code=EXIT_FAILURE if problems else 0)


def _format_result(result: CheckResult, done: list[str]) -> str:
    if result.in_training:
        return "in training: not checked"
    parts = [f"{defect.what} ({defect.remedy})" for defect in result.defects]
    if done:
        parts.append(f"repair: {', '.join(done)}")
    return "; ".join(parts) or "whole"


def _as_data(result: CheckResult, done: list[str]) -> dict[str, Any]:
    return {
        "run": result.name,
        "state": result.state,
        "checked": not result.in_training,
        "problems": [{"what": defect.what, "remedy": defect.remedy} for defect in result.defects],
        "repaired": done,
    }
