"""Suggested settings: what they are for a machine, data and earlier runs, and that each has its reason."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.described import describe
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.memory import check_fit
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_setting, replace_settings
from qlora_tui.recipe.layering import with_absolute_paths
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.remote.messages import from_json, result_type, to_json
from qlora_tui.runs.data_checks import KnownLengths
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.doctor import Machine
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, Finished
from qlora_tui.runs.evidence import PastRun
from qlora_tui.runs.suggestion_facts import read_facts
from qlora_tui.runs.suggestions import Suggestion, SuggestionFacts, Topic, suggest
from tests.support.step_events import a_data_set
from tests.tui.sample_data import readable_model, write_rows
from tests.tui.workstation import config_of

pytestmark = pytest.mark.slow

QWEN_7B = "Qwen__Qwen2.5-7B"
TINY = "HuggingFaceTB__SmolLM2-135M"


@cache
def architecture(config: str) -> Architecture:
    return describe(config_of(config))


def spread(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths between these two, both included."""
    numbers = random.Random(1)
    return [shortest, longest, *(numbers.randint(shortest, longest) for _ in range(count - 2))]


TICKETS = spread(1240, 40, 612)
FEW = spread(60, 40, 200)
LONG = spread(400, 6000, 30_000)
MANY = spread(8000, 500, 4000)


def facts(
    lengths: Sequence[int], config: str = QWEN_7B, *, gib: int | None = 12, settings: Any = (), **more: Any
) -> SuggestionFacts:
    """A machine with a GPU of this size, or without one, and samples of these lengths."""
    recipe = Recipe(model=Model(id="model"), data=Data(sources=(Source(path="rows.jsonl"),)))
    for path, value in dict(settings).items():
        recipe = replace_setting(recipe, path, value)
    gpu = None if gib is None else GpuDevice(0, "NVIDIA GeForce RTX 3060", None, gib << 30, "8.6", None)
    budget = budget_for(gpu)
    known = KnownLengths(array("I", lengths).tobytes(), array("H", [0] * len(lengths)).tobytes(), True, True)
    free = budget.bytes if gib else 24 << 30
    return SuggestionFacts(recipe, architecture(config), budget.device, budget.name, free, known, **more)


def by_topic(known: SuggestionFacts, *kept: Topic) -> dict[Topic, Suggestion]:
    return {one.topic: one for one in suggest(known, kept)}


def applied(known: SuggestionFacts) -> Recipe:
    recipe = known.recipe
    for one in suggest(known):
        recipe = replace_settings(recipe, one.changes)
    return recipe


INT8 = {"quantization.method": "int8", "training.micro_batch_size": 4}

MACHINES: dict[str, Callable[[], SuggestionFacts]] = {
    "12 GiB": lambda: facts(TICKETS),
    "12 GiB, few samples": lambda: facts(FEW),
    "12 GiB, long samples": lambda: facts(LONG),
    "12 GiB, many samples, not packed": lambda: facts(MANY, settings={"data.packing": False}),
    "12 GiB, pairs": lambda: facts(TICKETS, settings={"data.preferences": "dpo"}),
    "a CPU": lambda: facts(FEW, TINY, gib=None),
    "12 GiB, ratings": lambda: facts(FEW, settings={"data.preferences": "kto", "data.packing": False}),
    "12 GiB, int8, one long sample": lambda: facts([200_000], settings=INT8),
    "12 GiB, a high rank": lambda: facts(LONG, settings={"lora.rank": 512}),
    "three GPUs": lambda: facts(TICKETS, settings={"training.gpus": 3}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_suggested_fits_is_stable_and_has_its_reason(machine: str) -> None:
    known = MACHINES[machine]()
    recipe = applied(known)
    assert check_fit(known.estimate(recipe), known.available_bytes).fits_with_margin
    again = suggest(replace(known, recipe=recipe))
    assert [one.changes for one in again] == [{}] * 5
    assert all(
        one.reason.endswith(".") and (one.references or "counted" in one.reason or not one.is_known)
        for one in suggest(known)
    )
    assert recipe.training.gradient_accumulation % max(1, recipe.training.gpus) == 0


def test_the_length_keeps_every_sample_whole_as_far_as_memory_context_and_batch_allow() -> None:
    short = by_topic(facts(TICKETS))["length"]
    assert short.changes == {"data.max_length": 640}
    assert "1,240 samples of at most 612 tokens" in short.reason and "truncates none" in short.reason
    by_memory = by_topic(facts(LONG))["length"]
    assert (
        "no greater length fits in 12.0 GiB free" in by_memory.reason
        and "are cut (Overflow)" in by_memory.reason
    )
    by_context = by_topic(facts(spread(400, 6000, 30_000), TINY, gib=80))["length"]
    assert by_context.changes == {"data.max_length": 8192}
    one_long = [*spread(999, 40, 60), 20_000]
    by_batch = by_topic(facts(one_long, gib=80))["length"]
    assert by_batch.changes["data.max_length"] <= 32 * sum(one_long) / 1000
    assert "1 is longer than" in by_batch.reason and "too many for a step" in by_batch.reason
    unpacked = by_topic(facts(one_long, gib=80, settings={"data.packing": False}))["length"]
    assert unpacked.changes["data.max_length"] == 20_096
    nothing_fits = by_topic(facts(TICKETS, gib=4))["length"]
    assert not nothing_fits.is_known and not nothing_fits.changes


def test_the_rank_has_room_for_the_data_and_stays_where_ranks_do_equally_well() -> None:
    def rank(lengths: Sequence[int], now: int, **settings: Any) -> Any:
        known = facts(lengths, gib=80, settings={"lora.rank": now, "data.packing": False, **settings})
        return by_topic(known)["rank"].changes.get("lora.rank", now)

    assert [rank(TICKETS, now) for now in (2, 8, 64, 512)] == [8, 8, 64, 256]
    huge = [30_000] * 4000
    assert rank(huge, 16) == 32
    assert rank(huge, 16, **{"lora.init_from": "some-run"}) == 16


def test_a_step_has_the_published_samples_and_fewer_where_the_run_would_be_short() -> None:
    for lengths, least, most in ((TICKETS, 12, 23), (MANY, 12, 31), (FEW, 1, 4)):
        known = facts(lengths, gib=24)
        recipe = applied(known)
        sequences = sum(lengths) / recipe.data.max_length
        assert least <= recipe.effective_batch * len(lengths) / sequences <= most
    on_cpu = applied(facts(TICKETS, TINY, gib=None))
    assert on_cpu.training.micro_batch_size == 1
    assert applied(facts(TICKETS, gib=24)).training.micro_batch_size > 1


def test_what_is_said_of_a_step_holds_for_short_packed_samples_several_gpus_and_max_steps() -> None:
    def batch(lengths: Sequence[int], **settings: Any) -> Suggestion:
        return by_topic(facts(lengths, gib=24, settings=settings))["batch"]

    # 32 samples of 20 tokens are 640, and the shortest sequence has 128 tokens.
    assert by_topic(facts([20] * 3000, gib=24))["length"].then == "128"
    assert by_topic(facts([20, 1024] * 1500, gib=24))["length"].then == "1,024"
    tiny = batch([1] * 2000).reason
    assert "125 samples per step" in tiny and "are the minimum" in tiny and "near" not in tiny
    many = batch([1000] * 3000, **{"training.gpus": 64}).reason
    assert "64 samples per step are the minimum, because each of 64 GPUs needs a sequence; 32" in many
    assert "16 samples per step" in batch([1000] * 1500, **{"training.max_steps": 50}).reason.lower()
    rated = batch(FEW, **{"data.preferences": "kto", "data.packing": False})
    assert rated.changes == {"training.micro_batch_size": 8, "training.gradient_accumulation": 1}
    assert "reference point" in rated.reason


def test_pairs_are_counted_as_they_are_trained() -> None:
    sides = [100, 1000] * 600 + [9000, 90] * 40

    def said(overflow: str) -> dict[Topic, Suggestion]:
        settings = {"data.preferences": "dpo", "data.overflow": overflow, "training.max_steps": 0}
        return by_topic(facts(sides, TINY, gib=80, settings=settings, past=()))

    assert "640 pairs with sequences of at most 9,000 tokens" in said("drop")["length"].reason
    assert "40 are longer than 8,192 and are dropped" in said("drop")["length"].reason
    assert "are cut" in said("split")["length"].reason


def test_few_samples_are_not_said_to_have_usual_epochs() -> None:
    one = by_topic(facts([300]))["epochs"]
    assert one.then == "15" and "usual" not in one.reason and "fewer than 15 make a short run" in one.reason


def test_a_setting_that_is_kept_changes_what_depends_on_it() -> None:
    known = facts(TICKETS)
    freely, kept = by_topic(known)["batch"], by_topic(known, "length")["batch"]
    # Sequences of 1,024 tokens hold more samples than those of 640.
    assert freely.then == "2 × 4"
    assert kept.changes and kept.changes != freely.changes


def past(name: str, loss: float, *, best: float = 2.0, last: float = 2.0, **settings: Any) -> PastRun:
    recipe = facts(TICKETS).recipe
    for path, value in settings.items():
        recipe = replace_setting(recipe, path.replace("__", "."), value)
    return PastRun(name, recipe, "one", loss, best, last)


def test_the_rate_is_the_published_one_for_the_size_and_the_optimizer() -> None:
    def rate(config: str = QWEN_7B, **settings: Any) -> Suggestion:
        known = facts(TICKETS, config, gib=80, settings={"training.learning_rate": 1e-3, **settings})
        return by_topic(known)["rate"]

    assert rate().changes == {"training.learning_rate": 2e-4}
    assert rate("Qwen__Qwen2.5-32B").changes == {"training.learning_rate": 1e-4}
    assert "may need a higher rate" in rate(TINY).reason
    assert rate(**{"training.optimizer": "lion_8bit"}).changes["training.learning_rate"] < 1e-4
    for path, value in (
        ("lora.use_rslora", True),
        ("lora.alpha", 256.0),
        ("data.preferences", "dpo"),
        ("training.optimizer", "adafactor"),
    ):
        changed: dict[str, Any] = {path: value}
        left = rate(**changed)
        assert not left.is_known and not left.changes and left.reason.startswith("Unchanged")


def test_earlier_runs_decide_the_rate_only_if_they_differ_in_nothing_else() -> None:
    slow, fast = (
        past("slow", 2.1, training__learning_rate=1e-4),
        past("fast", 1.9, training__learning_rate=4e-4),
    )
    found = by_topic(facts(TICKETS, past=(slow, fast)))["rate"]
    assert found.changes == {"training.learning_rate": 4e-4}
    assert "fast" in found.reason and "1.900 (0.0001: 2.100)" in found.reason
    assert "a higher rate may be better" in found.reason
    dropped = [past(f"dropped {n}", 1.5, last=0.5, training__learning_rate=n * 1e-3) for n in range(1, 5)]
    assert by_topic(facts(TICKETS, past=(*dropped, slow, fast)))["rate"].reason == found.reason
    other = past("fast", 1.9, training__learning_rate=4e-4, training__epochs=5.0)
    alone = by_topic(facts(TICKETS, past=(slow, other)))["rate"]
    assert not alone.changes and "1.900" in alone.reason and "a run at another rate" in alone.reason
    another_method = past("fast", 1.9, training__learning_rate=4e-4, lora__use_dora=True)
    assert "1.9" not in by_topic(facts(TICKETS, past=(another_method,)))["rate"].reason


def test_epochs_follow_the_best_checkpoint_of_earlier_runs_and_else_the_number_of_samples() -> None:
    def epochs(lengths: Sequence[int], now: float, *runs: PastRun, **settings: Any) -> float:
        known = facts(lengths, settings={"training.epochs": now, **settings}, past=runs)
        return float(by_topic(known)["epochs"].changes.get("training.epochs", now))

    assert [epochs(TICKETS, now) for now in (0.5, 2, 5)] == [1, 2, 3]
    assert epochs(FEW, 2) == 3 and epochs(FEW[:10], 2) == 10
    assert epochs(TICKETS, 2, past("overfitted", 1.9, best=1.2, last=3)) == 2
    assert epochs(TICKETS, 2, past("overfitted", 1.9, best=0.8, last=3)) == 1
    assert epochs(TICKETS, 2, past("still falling", 1.9, best=4, last=4)) == 4
    assert epochs(TICKETS, 7, **{"training.max_steps": 50}) == 7


def test_facts_are_counted_and_read_from_runs_whose_data_is_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": f"Where is parcel {n}?", "completion": "On its way. " * (n % 40)} for n in range(1, 200)],
    )
    recipe = Recipe(
        model=Model(id=str(Path(readable_model(tmp_path)).relative_to(tmp_path))),
        data=Data(sources=(Source(path=path.name),), max_length=64),
    )
    later = path.stat().st_mtime + 100

    def trained(rate: float, at: float, data_hash: str = "one", *, has_ended: bool = True) -> str:
        run = create_run(with_absolute_paths(replace_setting(recipe, "training.learning_rate", rate)))
        with EventWriter(run.events_path) as log:
            log.append(
                a_data_set(at=at, samples=180, validation_samples=19, total_steps=20, data_hash=data_hash)
            )
            for step, loss in ((0, 3.0), (10, 2.0), (20, 2.5)):
                log.append(Evaluated(at=at, step=step, loss=loss + rate))
            if has_ended:
                log.append(Finished(at=at, step=20, seconds=1.0, tokens_per_s=1.0))
        return run.name

    trained(1e-3, later, "other rows")
    trained(1e-4, later - 1000)
    names = {trained(1e-4, later), trained(4e-4, later)}
    trained(2e-4, later, has_ended=False)
    known = read_facts(recipe, Machine(budget_for(None)))
    assert known.known.is_exact and known.lengths[-1] > 64
    assert {run.name for run in known.past} == names and known.outdated == 1
    assert {(run.best_epoch, run.last_epoch) for run in known.past} == {(1, 2)}
    os.utime(path, (later + 1000, later + 1000))
    changed = read_facts(recipe, Machine(budget_for(None)))
    assert not changed.past and changed.outdated == 4
    assert "4 earlier runs not considered" in by_topic(changed)["rate"].reason
    there = from_json(to_json(known), result_type(read_facts))
    assert suggest(there) == suggest(known), "on another machine they are read there"
