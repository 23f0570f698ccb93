"""``python -m qlora_tui.training RUN_DIR``: the trainer of one run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.retry import RetryPlan
from qlora_tui.training.supervisor import run_trainer

_ENVIRONMENT = {
    # Segments that grow cut the fragmentation that sample lengths of all kinds cause.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # Also what it starts, as for a dataset of the hub, asks nothing of the network.
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Parse the call and run; 2 with a message where the call is wrong."""
    parser = argparse.ArgumentParser(prog="python -m qlora_tui.training", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--micro-batch", type=int, help="in place of the recipe's")
    parser.add_argument("--gradient-accumulation", type=int, help="in place of the recipe's")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    given = parser.parse_args()
    plan = RetryPlan(
        micro_batch=given.micro_batch,
        gradient_accumulation=given.gradient_accumulation,
        gradient_checkpointing=given.gradient_checkpointing,
    )
    run = RunDir(given.run.absolute())
    try:
        if not run.path.is_dir():
            raise UserError("No such run", what=f"{run.path} is not a run's directory.", exit_code=EXIT_USAGE)
        configure_torch_env(_ENVIRONMENT)
        return run_trainer(run, plan)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())
