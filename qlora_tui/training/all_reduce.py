"""A program that ``qlora-tui doctor`` starts through torchrun to test whether GPUs can exchange gradients.

Prints the bytes per second that each process reduced. The program may hang in the driver, so its caller sets
a time limit.
"""

from __future__ import annotations

import time

from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.training.distributed import distributed_context, end_with_launcher

_NUMBERS = 16 << 20
_REPEATS = 5


def main() -> None:
    """Sum numbers over all processes several times, and check the sums."""
    end_with_launcher()
    configure_torch_env()
    import torch
    from torch import distributed

    process = distributed_context()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", process.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    ranks = torch.arange(1, process.world_size + 1)
    started_at = time.perf_counter()
    for repeat in range(_REPEATS + 1):
        values = torch.full((_NUMBERS,), float(process.rank + 1), device=device)
        distributed.all_reduce(values)
        if not bool((values == float(ranks.sum())).all()):
            raise SystemExit("The GPUs computed a wrong sum.")
        if repeat == 0:
            # The first all-reduce connects the processes, so it is not timed.
            started_at = time.perf_counter()
    seconds = time.perf_counter() - started_at
    if process.is_main_process:
        print(_REPEATS * _NUMBERS * 4 / seconds)
    process.disband()


if __name__ == "__main__":
    main()
