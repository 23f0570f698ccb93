"""``python -m bench.acceptance.check NAME CONTEXT.json OUTCOME.json``: makes one check."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from bench.acceptance.context import CheckContext, CheckSkipped, Outcome
from bench.acceptance.registry import CHECKS, Check


def main() -> int:
    """Make the check and write its outcome; returns 0 whatever the outcome is."""
    name, context_file, outcome_file = sys.argv[1:]
    outcome = outcome_of(CHECKS[name], CheckContext.read(Path(context_file)))
    draft = Path(f"{outcome_file}.draft")
    draft.write_text(json.dumps(asdict(outcome)))
    draft.rename(outcome_file)
    return 0


def outcome_of(check: Check, context: CheckContext) -> Outcome:
    """Make a check; whatever it raises is its failure."""
    try:
        return check.make(context)
    except CheckSkipped as why:
        return Outcome("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
