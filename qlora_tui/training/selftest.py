"""A job of ``qlora-tui doctor`` that trains two layers, to find out whether training works on this machine.

The job runs in a separate process, so that a crash in a native library becomes a finding instead of ending
the doctor. The model has random weights, so nothing is downloaded. ``bench`` and the tests train larger and
smaller random models.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_tui import worker
from qlora_tui.data.chat_template import stock_template
from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.installation import install_command
from qlora_tui.process_end import how_ended
from qlora_tui.recipe.schema import Data, Model, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.doctor import Check, CheckKind, Outcome
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import AnyEvent, Environment, Failed, Finished, Health, Step
from qlora_tui.settings import GPU_VARIABLE

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_random_model(folder: Path, texts: Sequence[str], *, device: str = "cpu", **shape: Any) -> Path:
    """Write random bfloat16 weights, in files of at most 1 GB, and a tokenizer trained on ``texts``.

    Returns ``folder``.

    Args:
        device: device that draws the random numbers; eight billion take minutes on a CPU.
        shape: settings of ``LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    template = stock_template("chatml", SPECIAL_TOKENS, begins_with_bos=False)
    tokenizer = write_tokenizer(folder, texts, template, vocab_size=512)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, **shape},
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="1GB")
    return folder


def write_tokenizer(folder: Path, texts: Sequence[str], template: str, *, vocab_size: int) -> Any:
    """Write a byte-level BPE tokenizer of at most ``vocab_size`` tokens, from ``texts``; return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    return fast


_ROWS = 40
_LAYERS = 2


def check_training() -> list[Check]:
    """Import the libraries, and train if the import works."""
    configure_torch_env()
    checks = [_library(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets")]
    if all(check.outcome == "ok" for check in checks):
        trained, on_gpu = _train()
        checks += trained
        if on_gpu:
            checks += _train(streamed_layers=1)[0]
            checks.append(_transfer())
    return checks


def _check(name: str, outcome: Outcome, text: str, fix: str = "") -> Check:
    return Check(CheckKind.LIBRARY, outcome, text, fix, name=name)


def _library(name: str) -> Check:
    try:
        importlib.import_module(name)
        return _check(name, "ok", version(name))
    except PackageNotFoundError:
        return _check(name, "ok", "version unknown")
    except Exception as error:  # a broken native library may raise anything
        return _check(name, "error", f"{error}", install_command(name))


def _train(*, streamed_layers: int = 0) -> tuple[list[Check], bool]:
    """Train a model of two layers with the real trainer and the defaults of a recipe.

    The test thus covers what a run uses: the allocator, the chosen optimizer, and attention and kernels,
    which the trainer compares with transformers and peft. With ``streamed_layers``, it also covers pinned
    memory. This process does not use the GPU while the trainer runs, because a GPU may allow only one process
    at a time.

    Returns:
        The checks, and whether the model was trained on a GPU.
    """
    name = "training with streamed layers" if streamed_layers else "training"
    with tempfile.TemporaryDirectory(prefix="qlora-tui-doctor-") as folder, _own_folders(Path(folder)):
        run = create_run(_recipe(Path(folder), streamed_layers), os.environ.get(GPU_VARIABLE, ""))
        command = worker.module_argv("qlora_tui.training", str(run.path))
        env = worker.subprocess_env()
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        events = list(EventTail(run.events_path).drain())
    if not any(isinstance(event, Finished) for event in events):
        return [*_warnings(name, events), _failure(name, events, done)], False
    environment = next(event for event in events if isinstance(event, Environment))
    return [_success(name, environment, events), *_warnings(name, events)], environment.device_kind == "cuda"


def _warnings(name: str, events: Sequence[AnyEvent]) -> list[Check]:
    health = (event for event in events if isinstance(event, Health))
    return [_check(name, "warning", event.evidence, event.remedy) for event in health]


def _success(name: str, environment: Environment, events: Sequence[AnyEvent]) -> Check:
    losses = [event.loss for event in events if isinstance(event, Step) and event.loss is not None]
    kernels = ", Triton kernels" if environment.kernels == "triton" else ""
    text = (
        f"{len(losses)} steps of a model of two layers on {environment.device} in "
        f"{environment.compute_dtype}, {environment.optimizer}, attention {environment.attention}{kernels}; "
        f"loss {losses[0]:.2f} → {losses[-1]:.2f}"
    )
    return _check(name, "ok", text)


def _failure(name: str, events: Sequence[AnyEvent], done: subprocess.CompletedProcess[bytes]) -> Check:
    """Return a failed check with the error in the run's events. If the trainer was killed, there is no such
    event; the check then has the trainer's exit code and last line of output.
    """
    failed = next((event for event in events if isinstance(event, Failed)), None)
    if failed is not None:
        return _check(name, "error", f"{failed.what} {failed.why}".strip(), failed.fix)
    last = (done.stdout.decode(errors="replace").strip().splitlines() or ["the trainer printed nothing"])[-1]
    text = f"The trainer {how_ended(done.returncode)}: {last}"
    return _check(name, "error", text, install_command("torch", "bitsandbytes"))


def _recipe(folder: Path, streamed_layers: int) -> Recipe:
    """Write a model and rows to ``folder``, and return a recipe for a short run on them.

    Its other settings are the defaults.
    """
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
    """Keep the runs, caches and measurements of this test apart from the user's."""
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


def _transfer() -> Check:
    """Measure the speeds that the estimate for streamed layers uses, and record them."""
    from qlora_tui.memory.calibration import record_speed
    from qlora_tui.training.compute_device import find_device
    from qlora_tui.training.streaming.host_memory import measure_speed

    name = "copies to the GPU"
    try:
        device = find_device(Recipe())
        if device.kind == "cpu":
            return _check(name, "note", "not measured: streamed layers save memory on a GPU only")
        speed = measure_speed(device)
        record_speed(device.name, speed)
    except Exception as error:  # the failure is reported as the finding
        text = f"{type(error).__name__}: {error}"
        return _check(name, "error", text, install_command("torch", "bitsandbytes"))
    copies, products = f"{speed.bytes_per_s / 1e9:.1f} GB/s", f"{speed.flops_per_s / 1e12:.1f} TFLOP/s"
    text = (
        f"{copies} from pinned memory, and {products} in {device.dtype_name}: these speeds decide how "
        "much slower streamed layers are"
    )
    return _check(name, "ok", text)
