"""Rows, steps and micro-batches: nothing lost, nothing twice, nothing cut."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from qlora_tui.data.step_plan import StepPlan, pack, plan_steps
from qlora_tui.recipe.schema import Data, Recipe
from qlora_tui.recipe.training_settings import Training
from qlora_tui.training.batches import (
    RowShape,
    Steps,
    collate,
    computed_tokens,
    count_tokens,
    micro_batches,
    sum_loss_weights,
    validation_batches,
)

pytestmark = pytest.mark.slow


class Fake:
    """Samples of given lengths; token ids are unlike in each, the second half of each trains."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def token_ids(self, i: int) -> list[int]:
        return [1000 * i + k for k in range(self._lengths[i])]

    def loss_mask(self, i: int) -> list[int]:
        return [int(k >= self._lengths[i] // 2) for k in range(self._lengths[i])]

    def weights(self, i: int) -> list[float] | None:
        return None

    def length(self, i: int) -> int:
        return self._lengths[i]

    def epoch(self, epoch: int, seed: int) -> array[int]:
        order = list(range(len(self)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        return array("I", order)


def lengths_of(count: int, least: int, most: int) -> list[int]:
    """Random, and the same every time."""
    numbers = random.Random(f"{count}/{least}/{most}")
    return [numbers.randint(least, most) for _ in range(count)]


PACKED = RowShape(packed=True, max_length=64)
LENGTHS = lengths_of(50, 2, 60)


def recipe(**training: object) -> Recipe:
    return Recipe(
        data=Data(max_length=64),
        training=Training(**{"gradient_accumulation": 3, "epochs": 2, **training}),  # type: ignore[arg-type]
    )


def samples_of(schedule: StepPlan) -> list[int]:
    return [i for step in schedule.steps for sequence in step.sequences for i in sequence]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(20, 60))
def test_packing_keeps_every_sample_whole_and_once(lengths: list[int], capacity: int) -> None:
    order = list(range(len(lengths)))
    rows = pack(order, lengths, capacity)
    assert sorted(i for row in rows for i in row) == order
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)


def test_packing_wastes_little() -> None:
    lengths = lengths_of(1000, 20, 400)
    rows = pack(range(1000), lengths, 1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.98


@pytest.mark.parametrize("padding_free", [True, False])
def test_an_epoch_is_every_sample_once(padding_free: bool) -> None:
    schedule = plan_steps(Fake(LENGTHS), recipe(), padding_free=padding_free)
    assert Counter(samples_of(schedule)) == Counter(dict.fromkeys(range(50), 2))
    assert schedule.steps[-1].epoch == 2.0
    assert [step.ends_epoch for step in schedule.steps].count(True) == 2


def test_a_fraction_of_an_epoch_trains_that_fraction_of_rows() -> None:
    whole = plan_steps(Fake(LENGTHS), recipe(epochs=1.0), padding_free=True)
    half = plan_steps(Fake(LENGTHS), recipe(epochs=1.5), padding_free=True)
    rows = sum(len(step.sequences) for step in half.steps)
    assert rows == whole.sequences_per_epoch + round(whole.sequences_per_epoch / 2)
    assert half.steps[-1].epoch == 1.5


def test_most_steps_cut_the_schedule_short() -> None:
    schedule = plan_steps(Fake(LENGTHS), recipe(max_steps=4), padding_free=True)
    assert len(schedule.steps) == 4


def test_epochs_come_in_different_orders_and_always_the_same_ones() -> None:
    once, again = (samples_of(plan_steps(Fake(LENGTHS), recipe(), padding_free=True)) for _ in range(2))
    assert once == again
    assert once[:50] != once[50:]


def test_rows_that_must_be_padded_lie_beside_their_like() -> None:
    lengths = lengths_of(400, 2, 600)
    schedule = plan_steps(Fake(lengths), recipe(epochs=1.0, micro_batch_size=4), padding_free=False)
    batches = [b for step in schedule.steps for b in micro_batches(step.sequences, 4)]
    computed = sum(computed_tokens(batch, Fake(lengths), padding_free=False) for batch in batches)
    assert sum(lengths) / computed > 0.9


def test_a_packed_batch_has_no_padding_or_cross_sample_labels() -> None:
    fake = Fake([4, 6, 3])
    batch = collate([(0, 2), (1,)], fake, PACKED)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 2000, 2001, 2002, *range(1000, 1006)]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [
        [-100, -100, 2, 3, -100, 2001, 2002, -100, -100, -100, 1003, 1004, 1005]
    ]
    assert batch["segments"] == [4, 3, 6]


def test_a_packed_batch_is_padded_after_its_last_sample() -> None:
    batch = collate(
        [(0, 2), (1,)], Fake([4, 6, 3]), RowShape(packed=True, max_length=64, multiple=8, pad_id=9)
    )
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 2000, 2001, 2002, *range(1000, 1006), 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, *range(6), 0, 0, 0]]
    assert batch["labels"].tolist()[0][-4:] == [1005, -100, -100, -100]
    assert batch["segments"] == [4, 3, 9]


def test_a_padded_micro_batch_learns_nothing_from_padding() -> None:
    batch = collate([(0,), (1,)], Fake([2, 4]), RowShape(packed=False, max_length=64, pad_id=7))
    assert batch["input_ids"].tolist() == [[0, 1, 7, 7], [1000, 1001, 1002, 1003]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100], [-100, -100, 1002, 1003]]


def test_validation_sees_every_sample_once() -> None:
    batches = validation_batches(Fake(LENGTHS), 2, PACKED)
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(50))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_a_step_is_the_same_however_it_is_split(processes: int, micro_batch: int) -> None:
    fake = Fake(LENGTHS)
    schedule = plan_steps(fake, recipe(micro_batch_size=2), padding_free=True)
    for n, step in enumerate(schedule.steps):
        shares = [
            Steps(schedule, fake, PACKED, micro_batch=micro_batch, rank=rank, world_size=processes)[n]
            for rank in range(processes)
        ]
        in_loss = [
            label
            for share in shares
            for batch in share["micro_batches"]
            for label in batch["labels"].flatten().tolist()
            if label != -100
        ]
        assert len({len(share["micro_batches"]) for share in shares}) == 1
        assert len(in_loss) == sum_loss_weights(step.sequences, fake) == shares[0]["loss_weight_sum"]
        assert shares[0]["tokens"] == count_tokens(step.sequences, fake)
