"""Steps and time of a run before its launch: the number that is shown is the number that is trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from qlora_tui.catalog.adapters import adapter_parameters
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.catalog.local_models import find_files
from qlora_tui.data.dataset import count_samples, prepare_dataset
from qlora_tui.data.step_plan import plan_steps
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.memory.budget import budget_for, this_processor
from qlora_tui.memory.traces import KnownTraces
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.recipe.targets import resolve_targets
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.data_checks import RunLength, run_length
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.doctor import CheckKind, Machine
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import AdapterReady
from qlora_tui.runs.expected_time import Forecast, count_data, expected_time, forecast
from qlora_tui.runs.preflight import preflight
from qlora_tui.runs.view import RunView
from tests.support.step_events import a_step, an_environment
from tests.tui.sample_data import readable_model, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return readable_model(tmp_path_factory.mktemp("model"))


def rows_of(count: int, *, pairs: bool = False) -> list[dict[str, Any]]:
    """Questions with answers of unlike lengths, some of them twice, some too long for 256 tokens."""
    numbers = random.Random(1)
    rows = []
    for n in range(count):
        answer = f"Parcel {n} " + "is on its way to the depot. " * numbers.choice([1, 2, 3, 5, 9, 40])
        row = {"prompt": f"Where is parcel {n // 2 if n % 7 == 0 else n}?"}
        rows.append(row | ({"chosen": answer, "rejected": "No."} if pairs else {"completion": answer}))
    return rows


RECIPES: dict[str, dict[str, Any]] = {
    "packed": {},
    "not packed": {"data.packing": False},
    "half an epoch": {"training.epochs": 1.5, "training.gradient_accumulation": 3},
    "limited": {"training.max_steps": 4},
    "no validation": {"data.validation_fraction": 0.0},
    "much validation": {"data.validation_fraction": 0.3, "training.seed": 7},
    "long samples dropped": {"data.overflow": "drop"},
    "long samples split": {"data.overflow": "split"},
    "preferences": {"data.preferences": "dpo"},
    "rated": {"data.preferences": "kto"},
    "eager": {"model.attention": "eager"},
    "streamed": {"quantization.streamed_layers": 4},
    "two sources": {"weights": (1.0, 2.5)},
    "validation file": {"validates": True},
}


def recipe_of(name: str, folder: Path, model: str) -> Recipe:
    """The recipe of this name, with data."""
    settings = dict(RECIPES[name])
    weights, validates = settings.pop("weights", (1.0,)), settings.pop("validates", False)
    compares = "data.preferences" in settings
    files = [
        str(write_rows(folder / f"{number}.jsonl", rows_of(90 + number, pairs=compares)))
        for number in range(len(weights) + validates)
    ]
    sources = tuple(Source(path=file, weight=weight) for file, weight in zip(files, weights, strict=False))
    recipe = Recipe(
        model=Model(id=model),
        data=Data(sources=sources, max_length=256, validation_path=files[-1] if validates else ""),
        training=Training(gradient_accumulation=4),
    )
    for path, value in settings.items():
        recipe = replace_setting(recipe, path, value)
    return recipe


def known_length(recipe: Recipe) -> RunLength:
    length = run_length(recipe, find_files(recipe.model.id))
    assert length is not None
    return length


@pytest.mark.parametrize("name", RECIPES)
def test_counted_steps_are_the_steps_that_the_trainer_plans(name: str, tmp_path: Path, model: str) -> None:
    recipe = recipe_of(name, tmp_path, model)
    tokenizer = ChatTokenizer.from_folder(Path(model), "auto")
    assert known_length(recipe).about
    count_samples(recipe, find_files(model), tokenizer)
    length = known_length(recipe)
    plan = plan_steps(
        prepare_dataset(recipe, tokenizer).train, recipe, padding_free=recipe.model.attention != "eager"
    )
    assert not length.about
    assert (length.steps, length.steps_per_epoch) == (len(plan.steps), plan.steps_per_epoch)


def test_batch_epochs_and_packing_need_no_new_count(tmp_path: Path, model: str) -> None:
    recipe = recipe_of("packed", tmp_path, model)
    count_samples(recipe, find_files(model), ChatTokenizer.from_folder(Path(model), "auto"))
    training = Training(epochs=3, gradient_accumulation=2)
    unpacked = structs.replace(recipe, data=structs.replace(recipe.data, packing=False), training=training)
    assert known_length(unpacked).is_exact
    shorter = structs.replace(recipe, data=structs.replace(recipe.data, max_length=64))
    assert not known_length(shorter).is_exact
    Path(recipe.data.sources[0].path).write_text('{"prompt": "a", "completion": "b"}\n')
    assert not known_length(recipe).is_exact


def test_data_of_which_every_row_is_too_long_is_an_error(tmp_path: Path, model: str) -> None:
    recipe = recipe_of("long samples dropped", tmp_path, model)
    recipe = structs.replace(recipe, data=structs.replace(recipe.data, max_length=16))
    assert count_data(recipe)
    assert not count_data(recipe)
    checks = preflight(recipe, Machine(budget_for(None)))
    check = next(check for check in checks if check.kind is CheckKind.DATA)
    assert check.problem is not None and check.problem.title == "Nothing to train on"
    assert "the limit of 16 tokens" in check.text
    assert forecast(recipe, Machine(budget_for(None))) is None
    with pytest.raises(UserError, match="Nothing to train on"):
        prepare_dataset(recipe, ChatTokenizer.from_folder(Path(model), "auto"))


def trained(recipe: Recipe, device: str, tokens_per_s: float, *, parameters: int | None = None) -> str:
    """The name of a run that trained at this speed, and this many weights."""
    run = create_run(recipe)
    log = EventWriter(run.events_path)
    log.append(an_environment(device))
    if parameters is not None:
        log.append(AdapterReady(trained_parameters=parameters, total_parameters=10 * parameters))
    for step in range(1, 5):
        log.append(a_step(step, tokens_per_s=tokens_per_s if step > 1 else 0.1))
    log.close()
    return run.name


def known_forecast(recipe: Recipe, machine: Machine) -> Forecast:
    expected = forecast(recipe, machine)
    assert expected is not None
    return expected


def test_the_time_is_by_the_nearest_run_on_this_device(tmp_path: Path, model: str) -> None:
    small = structs.replace(recipe_of("no validation", tmp_path, model), name="small")
    large_id = readable_model(tmp_path / "large", "HuggingFaceTB__SmolLM2-1.7B")
    large = structs.replace(small, name="large", model=Model(id=large_id))
    here = Machine(budget_for(None))
    assert known_forecast(small, here).time is None
    (check,) = [check for check in preflight(small, here) if check.kind is CheckKind.TIME]
    assert "Unknown until the first steps" in check.text

    gpu = GpuDevice(0, "NVIDIA GeForce RTX 4090", None, 24 << 30, "8.9", None)
    calculated = known_forecast(small, Machine(budget_for(gpu), gpu=gpu)).time
    assert calculated is not None and calculated.basis == "typical card"

    processor = this_processor().name
    trained(small, "another processor", 1e6)
    architecture = parse_architecture(Path(small.model.id) / "config.json")
    tokens = known_length(small).tokens
    assert expected_time(small, architecture, here, tokens) is None
    slow = trained(large, processor, 10.0)
    by_large = known_forecast(small, here).time
    assert by_large is not None and (by_large.run, by_large.basis) == (slow, "another model")
    assert by_large.seconds < tokens / 50
    name = trained(small, processor, 100.0)
    by_small = known_forecast(small, here).time
    assert by_small is not None and (by_small.run, by_small.basis) == (name, "run")
    assert by_small.seconds == pytest.approx(tokens / 100)
    (check,) = [check for check in preflight(small, here) if check.kind is CheckKind.TIME]
    assert f"judging by {name}." in check.text
    limited = structs.replace(small, training=Training(epochs=4, max_steps=1))
    assert known_length(limited).tokens < tokens / 2


def test_a_run_counts_although_its_model_was_moved_and_is_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    recipe, budget = recipe_of("no validation", tmp_path, model), budget_for(None)
    moved = structs.replace(recipe, model=Model(id=f"/moved/{Path(model).name}"))
    architecture = parse_architecture(Path(model) / "config.json")
    weights = adapter_parameters(resolve_targets(recipe.lora, architecture.targets), recipe.lora)
    trained(moved, this_processor().name, 10.0, parameters=weights + 1)
    assert known_forecast(recipe, Machine(budget)).time is None, "another model of this name"
    name = trained(moved, this_processor().name, 100.0, parameters=weights)
    time = known_forecast(recipe, Machine(budget)).time
    assert time is not None and (time.run, time.basis) == (name, "run")
    # A new trace has no run read again.
    monkeypatch.setattr(RunView, "from_sample", lambda run, steps: pytest.fail("A run was read again."))
    assert known_forecast(recipe, Machine(budget.with_traces(KnownTraces()))).time == time
