"""The job of :mod:`qlora_tui.runs.step_probe`, which trains a run's first steps and writes no run folder.

Only caches, such as that of quantized weights, are written.
"""

from __future__ import annotations

import os

from qlora_tui import paths
from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env, faster_imports
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.step_probe import StepProbe
from qlora_tui.worker import Report

_NEVER_WRITTEN = "probe"
"""Name of a run folder that is never created."""


def probe(recipe: Recipe, steps: int, report: Report) -> StepProbe:
    """Train the first steps of a recipe and discard the result. Raises any error that ends an attempt."""
    configure_torch_env({**allocator_variables(os.environ), "HF_HUB_OFFLINE": "1"})
    report(0, steps, "loading libraries")
    with faster_imports():
        from qlora_tui.training.compute_device import find_device
        from qlora_tui.training.control_requests import ControlRequests
        from qlora_tui.training.distributed import DistributedContext
        from qlora_tui.training.host import lower_priority
        from qlora_tui.training.loop import Loop
        from qlora_tui.training.reporter import QuietReporter
        from qlora_tui.training.run import Run
        from qlora_tui.training.setup import setup

    # Otherwise the answers to replay would be generated first, which takes minutes.
    recipe = replace_setting(recipe, "training.replay_share", 0.0)
    paths.runs_dir().mkdir(parents=True, exist_ok=True)
    directory, dist = RunDir(paths.runs_dir() / _NEVER_WRITTEN), DistributedContext()
    reporter = QuietReporter(directory, lambda text: report(0, steps, text))
    run = Run(
        directory=directory,
        recipe=recipe,
        checkpoint=None,
        reporter=reporter,
        requests=ControlRequests(directory, reporter, dist),
        dist=dist,
        keeps_files=False,
    )
    run.device = find_device(recipe)
    on_cpu = run.device.kind == "cpu"
    if on_cpu:
        lower_priority()
    dist.initialize(on_cpu=on_cpu)
    setup(run)
    loop = Loop(run)
    count, seconds = loop.time_steps(steps, lambda done, total: report(done, total, "training"))
    return StepProbe(
        steps=count,
        seconds=seconds,
        tokens=loop.trained_tokens,
        peak_bytes=run.meter.measure("end").measured_bytes,
    )
