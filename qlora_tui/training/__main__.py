"""``python -m qlora_tui.training RUN_DIR``: the trainer of one run."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qlora_tui.errors import EXIT_USAGE, UserError
from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.memory_retry import RetryPlan, parse_plan
from qlora_tui.settings import GPU_VARIABLE
from qlora_tui.training.supervisor import run_trainer

_ENVIRONMENT = {
    # Child processes, such as the one that reads a Hub dataset, must not use the network either.
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Parse the command line and train. Returns the exit code, which is 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m qlora_tui.training", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--plan", metavar="JSON", help="settings of [training] that override the recipe")
    parser.add_argument("--gpu", help="the GPUs that the runner took for it, instead of the user's choice")
    arguments = parser.parse_args()
    run = RunDir(arguments.run.absolute())
    try:
        plan = RetryPlan() if arguments.plan is None else parse_plan(arguments.plan)
        if not run.path.is_dir():
            raise UserError("No such run", what=f"{run.path} is not a run directory.", exit_code=EXIT_USAGE)
        if gpus := arguments.gpu or run.gpu:
            os.environ[GPU_VARIABLE] = gpus
        else:  # The environment's value belongs to the run of the command that started the runner.
            os.environ.pop(GPU_VARIABLE, None)
        configure_torch_env({**allocator_variables(os.environ), **_ENVIRONMENT})
        return run_trainer(run, plan)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())
