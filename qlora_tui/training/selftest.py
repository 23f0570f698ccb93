"""``python -m qlora_tui.training.selftest``: trains two layers, to see whether training works here.

Prints one JSON list of checks on the last line; run by ``qlora-tui doctor``, so that a crash in a native
library is a finding and not the doctor's end.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_tui import subprocesses
from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.installation import install_command
from qlora_tui.recipe.schema import Data, Model, Quantization, Recipe, Source, Training
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import AnyEvent, Environment, Failed, Finished, Health, Step
from qlora_tui.settings import GPU_VARIABLE
from qlora_tui.training.random_model import write_random_model

_ROWS = 40
_LAYERS = 2
Finding = dict[str, str]
"""The arguments of a ``machine_checks.Check``."""


def main() -> int:
    """Run every check; always 0, since the findings are the outcome."""
    # Libraries print to stdout, where only the checks may be.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    configure_torch_env()
    checks = [_library(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets")]
    if all(check["outcome"] == "ok" for check in checks):
        findings, on_gpu = _train()
        checks += findings
        if on_gpu:
            checks += _train(streamed_layers=1)[0]
            checks.append(_run_check("copies to the GPU", _transfer))
    out.write(json.dumps(checks) + "\n")
    out.flush()
    return 0


def _library(name: str) -> dict[str, str]:
    try:
        importlib.import_module(name)
        return {"name": name, "outcome": "ok", "text": version(name)}
    except PackageNotFoundError:
        return {"name": name, "outcome": "ok", "text": "version unknown"}
    except Exception as error:  # whatever a broken native library raises
        return {"name": name, "outcome": "error", "text": f"{error}", "fix": install_command(name)}


def _run_check(name: str, check: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return {"name": name} | check()
    except Exception as error:  # a failure is the finding
        return {
            "name": name,
            "outcome": "error",
            "text": f"{type(error).__name__}: {error}",
            "fix": install_command("torch", "bitsandbytes"),
        }


def _train(*, streamed_layers: int = 0) -> tuple[list[Finding], bool]:
    """Train a model of two layers by the real trainer, with the defaults of a recipe.

    So what is tried is what a run does: its allocator, its choice of optimizer, attention and kernels, each
    compared with the libraries, and with ``streamed_layers`` pinned memory.

    Returns:
        The findings, and whether it trained on a GPU. This process itself leaves the GPU alone meanwhile,
        which may be for one process at a time.
    """
    name = "training with streamed layers" if streamed_layers else "training"
    with tempfile.TemporaryDirectory(prefix="qlora-tui-doctor-") as folder, _own_folders(Path(folder)):
        run = create_run(_recipe(Path(folder), streamed_layers), os.environ.get(GPU_VARIABLE, ""))
        command = subprocesses.module_argv("qlora_tui.training", str(run.path))
        env = subprocesses.subprocess_env()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        events = list(EventTail(run.events_path).drain())
    findings = [
        {"outcome": "warning", "text": event.evidence, "fix": event.remedy}
        for event in events
        if isinstance(event, Health)
    ]
    if not any(isinstance(event, Finished) for event in events):
        output = done.stdout.decode(errors="replace")
        return [{"name": name} | _failure(events, done.returncode, output)], False
    environment = next(event for event in events if isinstance(event, Environment))
    findings.insert(0, _success(environment, events))
    return [{"name": name} | finding for finding in findings], environment.device_kind == "cuda"


def _success(environment: Environment, events: Sequence[AnyEvent]) -> Finding:
    losses = [event.loss for event in events if isinstance(event, Step) and event.loss is not None]
    kernels = ", Triton kernels" if environment.kernels == "triton" else ""
    return {
        "outcome": "ok",
        "text": f"{len(losses)} steps of a model of two layers on {environment.device} in "
        f"{environment.compute_dtype}, {environment.optimizer}, attention {environment.attention}{kernels}; "
        f"loss {losses[0]:.2f} → {losses[-1]:.2f}",
    }


def _failure(events: Sequence[AnyEvent], code: int, output: str) -> Finding:
    """What ended the run, by its last event; a trainer that was killed leaves none."""
    failed = next((event for event in events if isinstance(event, Failed)), None)
    if failed is not None:
        return {"outcome": "error", "text": f"{failed.what} {failed.why}".strip(), "fix": failed.fix}
    last = (output.strip().splitlines() or ["It printed nothing."])[-1]
    return {
        "outcome": "error",
        "text": f"The trainer ended with code {code}: {last}",
        "fix": install_command("torch", "bitsandbytes"),
    }


def _recipe(folder: Path, streamed_layers: int) -> Recipe:
    """The default recipe, short, with a model and rows of its own in the folder."""
    sums = [(number, 3 * number, 4 * number) for number in range(_ROWS)]
    rows = [{"instruction": f"Add {a} and {b}.", "output": f"The sum is {c}."} for a, b, c in sums]
    (folder / "rows.json").write_text(json.dumps(rows))
    model = write_random_model(
        folder / "model",
        [str(row) for row in rows],
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    return Recipe(
        model=Model(id=str(model)),
        quantization=Quantization(streamed_layers=streamed_layers),
        data=Data(sources=(Source(path=str(folder / "rows.json")),), max_length=64, validation_fraction=0.0),
        training=Training(gradient_accumulation=1, epochs=1.0, general_prompts=0, task_prompts=0),
    )


@contextmanager
def _own_folders(folder: Path) -> Iterator[None]:
    """Keep runs, caches and measurements of this test apart from the user's."""
    variables = {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CONFIG", "STATE", "CACHE")}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _transfer() -> dict[str, str]:
    """Measure what the estimate says of streamed layers, and record it."""
    from qlora_tui.memory.calibration import record_speed
    from qlora_tui.recipe.schema import Recipe
    from qlora_tui.training.compute_device import find_device
    from qlora_tui.training.streaming.speed_measurement import measure_speed

    device = find_device(Recipe())
    if device.kind == "cpu":
        return {"outcome": "note", "text": "not measured: streamed layers save memory on a GPU only"}
    speed = measure_speed(device)
    record_speed(device.name, speed)
    copies, products = f"{speed.bytes_per_s / 1e9:.1f} GB/s", f"{speed.flops_per_s / 1e12:.1f} TFLOP/s"
    return {
        "outcome": "ok",
        "text": f"{copies} from pinned memory, and {products} in {device.dtype_name}: how much slower "
        "streamed layers are follows from both",
    }


if __name__ == "__main__":
    sys.exit(main())
