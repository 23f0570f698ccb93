"""Optimizers and schedules are those of transformers and peft, and a checkpoint holds all of their states."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from transformers import get_scheduler

from qlora_tui.gpu import torch_env
from qlora_tui.memory.execution import Device, trainer_execution
from qlora_tui.memory.static_memory import state_sizes
from qlora_tui.recipe.fields import fields
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.compute_device import find_device
from qlora_tui.training.optimizers import SCHEDULES, create_optimizer, create_schedule
from qlora_tui.training.trainer import Trainer

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "auto": "paged_adamw_8bit",
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
}
"""transformers' name of each choice of ``training.optimizer``."""
CONCRETE = [name for name in OPTIMIZERS if name != "auto"]
"""``auto`` is one of these."""
PEAK, RATIO, DECAY = 2e-3, 8.0, 0.1


def adapted(tiny_model: Path, **lora: Any) -> Any:
    """A model with adapter tensors from 1,024 to 8,192 elements."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 16}}
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(model, LoraConfig(**{"r": 64, **targets, **lora}))


@pytest.fixture
def varied(tiny_model: Path) -> Any:
    """A model with matrices, DoRA's magnitudes and trained token rows."""
    return adapted(tiny_model, r=4, use_dora=True, trainable_token_indices=[3], rank_pattern={})


def new_trainer(model: Any, optimizer: Any, **settings: Any) -> Trainer:
    training = Training(learning_rate=PEAK, weight_decay=DECAY, optimizer=optimizer, **settings)
    return Trainer(model, training, find_device(Recipe()), 4)


def trained(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def step(trainer: Trainer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(trainer):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    trainer.optimizer.step()


def groups(model: Any, optimizer: Any) -> list[tuple[set[str], float, float]]:
    """(names, rate, weight decay) of each group with parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[p] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        if group["params"]
    ]


@pytest.mark.parametrize("optimizer", fields()["training.optimizer"].choices)
def test_every_optimizer_is_that_of_transformers(varied: Any, tmp_path: Path, optimizer: Any) -> None:
    from transformers import Trainer as StockTrainer  # which imports datasets
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        optim=OPTIMIZERS[optimizer],
        learning_rate=PEAK,
        weight_decay=DECAY,
        report_to="none",
    )
    theirs: Any = StockTrainer(varied, arguments).create_optimizer()
    training = Training(learning_rate=PEAK, weight_decay=DECAY, optimizer=optimizer)
    ours: Any = create_optimizer(varied, training)
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults
    assert groups(varied, ours) == groups(varied, theirs)
    assert len(ours.param_groups) == len(theirs.param_groups)
    assert getattr(ours, "is_paged", None) == getattr(theirs, "is_paged", None)
    assert vars(getattr(ours, "args", object)) == vars(getattr(theirs, "args", object))


@pytest.mark.parametrize("optimizer", CONCRETE)
def test_states_take_what_the_estimate_says(tiny_model: Path, optimizer: Any) -> None:
    trainer = new_trainer(adapted(tiny_model), optimizer)
    step(trainer, 1)
    execution = trainer_execution(Recipe(training=Training(optimizer=optimizer)), Device(kind="cpu"))
    for parameter in trained(trainer):
        state = trainer.optimizer.state[parameter].items()
        # bitsandbytes' code tables are shared, and torch counts steps.
        sizes = [x.nbytes for name, x in state if torch.is_tensor(x) and name[:4] not in ("qmap", "step")]
        assert sorted(sizes) == sorted(state_sizes(tuple(parameter.shape), execution))


@pytest.mark.parametrize("optimizer", CONCRETE)
def test_a_checkpoint_continues_each_optimizer_exactly(
    tiny_model: Path, tmp_path: Path, optimizer: str
) -> None:
    first = new_trainer(adapted(tiny_model), optimizer, lora_plus_ratio=2.0)
    step(first, 1)
    first.save(tmp_path)
    second = new_trainer(adapted(tiny_model), optimizer, lora_plus_ratio=2.0)
    second.load(tmp_path)
    # Without the first step's states it differs.
    third = new_trainer(adapted(tiny_model), optimizer, lora_plus_ratio=2.0)
    with torch.no_grad():
        for own, other in zip(trained(third), trained(first), strict=True):
            own.copy_(other)
    for trainer in (first, second, third):
        step(trainer, 2)
    assert all(map(torch.equal, trained(first), trained(second)))
    assert not all(map(torch.equal, trained(first), trained(third)))


@pytest.mark.usefixtures("quick_trainers")
@pytest.mark.parametrize(("case", "states"), [("reset", "[0, 0]"), ("save", "[3, 3]")])
def test_paged_states_are_touched_once_the_gpu_is_done(case: str, states: str) -> None:
    command = [sys.executable, "-m", "tests.training.managed_states", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, states), done.stderr[-2000:]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_an_optimizer_pages_no_states_on_wsl2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any, ratio: float
) -> None:
    model, training = adapted(tiny_model), Training(optimizer=optimizer, lora_plus_ratio=ratio)

    def pages() -> bool:
        created: Any = create_optimizer(model, training)
        return bool(created.is_paged)

    assert pages()
    (tmp_path / "osrelease").write_text("5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.setattr(torch_env, "_KERNEL_RELEASE", tmp_path / "osrelease")
    assert not pages()


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_lora_plus_has_the_groups_of_peft(varied: Any, optimizer: Any) -> None:
    from peft.optimizers import create_loraplus_optimizer

    training = Training(learning_rate=PEAK, weight_decay=DECAY, optimizer=optimizer, lora_plus_ratio=RATIO)
    ours = groups(varied, create_optimizer(varied, training))
    theirs = create_loraplus_optimizer(
        varied, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    assert ours == groups(varied, theirs)
    (a_names, a_rate, _), (b_names, b_rate, _) = ours
    assert a_rate == PEAK and b_rate == RATIO * PEAK
    assert all("lora_A" in name or "token_adapter" in name for name in a_names)
    assert all("lora_B" in name or "magnitude" in name for name in b_names)


def test_a_changed_rate_keeps_the_ratio(varied: Any) -> None:
    trainer = new_trainer(varied, "adamw", lora_plus_ratio=RATIO)
    trainer.set_learning_rate(PEAK / 10)
    rates = [rate for _, rate, _ in groups(varied, trainer.optimizer)]
    assert rates == pytest.approx([PEAK / 10, RATIO * PEAK / 10])


def plain_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(schedule: Any, steps: int) -> list[float]:
    """The rate of each step, and the one after the last."""
    result = []
    for _ in range(steps + 1):
        result.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return result


def rates_of_run(training: Training, steps: int) -> list[float]:
    return rates(create_schedule(plain_optimizer(), training, steps), steps)


def test_every_schedule_of_the_recipe_has_a_name_in_transformers() -> None:
    assert set(fields()["training.lr_scheduler"].choices) == SCHEDULES.keys()


@pytest.mark.parametrize(
    ("settings", "name", "theirs"),
    [
        ({"lr_scheduler": "cosine"}, "cosine", {}),
        ({"lr_scheduler": "linear"}, "linear", {}),
        ({"lr_scheduler": "constant"}, "constant_with_warmup", {}),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_cycles": 3},
            "cosine_with_restarts",
            {"num_cycles": 3},
        ),
        ({"lr_scheduler": "polynomial", "lr_power": 3.0}, "polynomial", {"power": 3.0, "lr_end": 0.0}),
        (
            {"lr_scheduler": "wsd", "lr_decay_share": 0.25},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "decay_type": "1-sqrt"},
        ),
    ],
)
def test_every_rate_after_warmup_is_that_of_transformers(
    settings: dict[str, Any], name: str, theirs: dict[str, Any]
) -> None:
    steps, warmup = 40, 4
    ours = rates_of_run(Training(learning_rate=PEAK, warmup_ratio=0.1, **settings), steps)
    stock = rates(get_scheduler(name, plain_optimizer(), warmup, steps, theirs), steps)
    assert ours[warmup:] == pytest.approx(stock[warmup:], abs=1e-12)
    # The warm-up is one step ahead, so that the first step is not wasted.
    assert ours[:warmup] == pytest.approx([*stock[1:warmup], PEAK])


def test_a_decay_longer_than_the_rest_begins_after_warmup() -> None:
    training = Training(learning_rate=PEAK, lr_scheduler="wsd", warmup_ratio=0.5, lr_decay_share=0.9)
    falling = rates_of_run(training, 10)[5:]
    assert falling[0] == PEAK and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.0), (2, 0.9), (6, 0.5)])
def test_short_runs_have_positive_finite_rates(schedule: Any, steps: int, warmup_ratio: float) -> None:
    training = Training(learning_rate=PEAK, lr_scheduler=schedule, warmup_ratio=warmup_ratio)
    of_each_step = rates_of_run(training, steps)[:steps]
    assert all(math.isfinite(rate) and 0 < rate <= PEAK for rate in of_each_step)
