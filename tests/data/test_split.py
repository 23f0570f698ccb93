from __future__ import annotations

import random
from array import array
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.data.conversation import Conversation, Message
from qlora_tui.data.split import Split, group_key, minhash_sketch, validation_rows

WORDS = [f"{start}{end}" for start in "bdfgklmnprstvz" for end in ("a", "el", "ir", "on", "um", "ys")]


def said(words: list[str], source: int = 0) -> Conversation:
    return Conversation((Message("user", "Go on."), Message("assistant", " ".join(words))), source=source)


def split_of(rows: list[Conversation], folder: Path, fraction: float, seed: int = 1) -> set[Conversation]:
    """The rows that are held back."""
    split = Split(folder, fraction)
    keys = [group_key(row, seed) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        split.add(row.source, key, minhash_sketch(row))
    held = split.held_back()
    return {row for row, key in zip(rows, keys, strict=True) if key in held}


def families(chance: random.Random, count: int, sources: int) -> list[list[Conversation]]:
    """Texts, each with copies in which one word in ten or fewer, all in one place, is another."""
    conversations = []
    for _ in range(count):
        words = [chance.choice(WORDS) for _ in range(chance.randint(60, 120))]
        family = [said(words, chance.randrange(sources))]
        for _ in range(chance.choice((0, 0, 1, 3))):
            copy = list(words)
            at = chance.randrange(len(copy))
            copy[at : at + chance.randint(1, 4)] = chance.sample(WORDS, chance.randint(1, 4))
            family.append(said(copy, chance.randrange(sources)))
        conversations.append(family)
    return conversations


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), sources=st.integers(1, 3), fraction=st.sampled_from([0.05, 0.2, 0.5]))
def test_near_duplicates_stay_on_one_side_in_any_order(
    tmp_path: Path, seed: int, sources: int, fraction: float
) -> None:
    chance = random.Random(seed)
    conversations = families(chance, 60, sources)
    rows = [row for family in conversations for row in family]
    held = split_of(rows, tmp_path, fraction)
    for family in conversations:
        assert len({row in held for row in family}) == 1
    chance.shuffle(rows)
    assert split_of(rows, tmp_path, fraction) == held
    for source in range(sources):
        of_it = [row for row in rows if row.source == source]
        assert abs(sum(row in held for row in of_it) - fraction * len(of_it)) <= 4


def test_the_seed_decides_which(tmp_path: Path) -> None:
    rows = [row for family in families(random.Random(3), 60, 1) for row in family]
    one, other = (split_of(rows, tmp_path, 0.2, seed) for seed in (1, 2))
    assert one and other and one != other


def test_what_only_shares_a_wording_is_not_kept_together(tmp_path: Path) -> None:
    wording = [f"word{n}" for n in range(80)]
    rows = [said([*wording, f"first{n}", f"second{n}"]) for n in range(100)]
    assert len(split_of(rows, tmp_path, 0.1)) == 10


def test_no_sketch_is_left_behind(tmp_path: Path) -> None:
    assert not split_of([said(["yes"])], tmp_path, 0.0)
    split_of([said(["yes"]), said(["no"])], tmp_path, 0.5)
    assert not list(tmp_path.iterdir())


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=200), st.floats(0, 0.99)
)
def test_a_split_is_grouped_and_never_takes_everything(rows: list[tuple[int, int]], fraction: float) -> None:
    groups = array("Q", (group for group, _ in rows))
    held = validation_rows(groups, [source for _, source in rows], fraction)
    assert held <= set(groups)
    assert held != set(groups)
    assert bool(held) == (fraction > 0 and len(set(groups)) > 1)


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([90, *[1] * 10], 0.05, 5),
        ([4] * 25, 0.01, 4),
        ([60, 40], 0.05, 40),
    ],
)
def test_a_large_group_does_not_make_the_side_large(sizes: list[int], fraction: float, expected: int) -> None:
    groups = array("Q", (group for group, size in enumerate(sizes) for _ in range(size)))
    held = validation_rows(groups, [0] * len(groups), fraction)
    assert sum(Counter(groups)[group] for group in held) == expected
