"""``doctor``: test whether this machine can train, and suggest fixes."""

from __future__ import annotations

import argparse

from qlora_tui.cli.subcommand import CommandResult, Subcommand
from qlora_tui.errors import EXIT_FAILURE
from qlora_tui.runs.machine_checks import Check, CheckKind, check_libraries, check_system


def run(args: argparse.Namespace) -> CommandResult:
    """Run every check, in the order in which they would fail a run."""
    checks = check_system()
    # One error for one cause: a trainer would refuse the same GPU.
    without_gpu = any(check.kind is CheckKind.GPU and check.outcome == "error" for check in checks)
    checks += check_libraries(on_cpu=without_gpu)
    failed = any(check.outcome == "error" for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:<7}  {check.label}: {_text(check)}")
        if check.fix:
            lines.append(f"         ▸ {check.fix}")
    lines.append("Not ready to train: fix the errors above." if failed else "Ready to train.")
    return CommandResult(
        data={"ok": not failed, "checks": [_as_data(check) for check in checks]},
        text="\n".join(lines),
        exit_code=EXIT_FAILURE if failed else 0,
    )


def _text(check: Check) -> str:
    return f"{check.text} {check.problem.why}".rstrip() if check.problem else check.text


def _as_data(check: Check) -> dict[str, str]:
    return {"name": check.label, "outcome": check.outcome, "text": _text(check), "fix": check.fix}


SUBCOMMANDS = {"doctor": Subcommand(run, uses_gpu=True)}
