from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.data import dataset
from qlora_tui.data.dataset import PreparedDataset, PrepareProgress, prepare_dataset
from qlora_tui.data.samples import TokenizedSample, truncate
from qlora_tui.data.store import Store
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from tests.data.families import family
from tests.runs.test_check import flip


def write(path: Path, rows: list[Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def pairs(count: int, what: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{what} {n}?", "completion": f"answer {n}"} for n in range(count)]


def recipe(*sources: Source, seed: int = 42, **data: Any) -> Recipe:
    return Recipe(data=Data(sources=sources, **data), training=Training(seed=seed))


def side(prepared: PreparedDataset, name: str) -> list[str]:
    samples = prepared.train if name == "train" else prepared.validation
    return [family("chatml").decode(list(samples.token_ids(i))) for i in range(len(samples))]


def test_what_is_stored_is_what_is_rendered(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(40))
    prepared = prepare_dataset(recipe(source), family("chatml"))
    assert prepared.counts.rows == prepared.counts.conversations == prepared.counts.samples == 40
    assert len(prepared.train) == 38
    assert len(prepared.validation) == 2
    tokenizer = family("chatml")
    for samples in (prepared.train, prepared.validation):
        for i in range(len(samples)):
            ids, loss_mask = list(samples.token_ids(i)), bytes(samples.loss_mask(i))
            source_index, row = samples.origin(i)
            assert source_index == 0
            assert samples.length(i) == len(ids) == len(loss_mask)
            assert samples.trained_count(i) == loss_mask.count(1)
            decoded = tokenizer.decode([t for t, flag in zip(ids, loss_mask, strict=True) if flag])
            assert decoded == f"answer {row - 1}<|im_end|>\n"
    total = sum(prepared.train.lengths()) + sum(prepared.validation.lengths())
    assert total == prepared.counts.tokens


def test_the_same_recipe_finds_the_set_again(tmp_path: Path) -> None:
    small_recipe = recipe(write(tmp_path / "a.jsonl", pairs(20)))
    first, second = (
        prepare_dataset(small_recipe, family("chatml")),
        prepare_dataset(small_recipe, family("chatml")),
    )
    assert (first.cached, second.cached) == (False, True)
    assert first.data_hash == second.data_hash
    assert first.counts == second.counts
    assert side(first, "train") == side(second, "train")


def test_bad_rows_are_skipped_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = write(path, pairs(20))
    path.write_text(path.read_text() + "{bad\n")
    prepared = prepare_dataset(recipe(source, bad_rows="skip"), family("chatml"))
    assert (prepared.counts.rows, prepared.counts.samples, prepared.counts.left_out) == (21, 20, 1)
    # Not from the cache: that set has no bad row.
    with pytest.raises(UserError):
        prepare_dataset(recipe(source), family("chatml"))


def test_files_of_a_folder_that_are_not_read_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", pairs(20))
    write(tmp_path / "test.jsonl", pairs(20))
    for cached in (False, True):
        prepared = prepare_dataset(recipe(Source(path=str(tmp_path))), family("chatml"))
        (note,) = prepared.source_notes
        assert (prepared.cached, prepared.counts.rows) == (cached, 20)
        assert note.endswith("not read: test.jsonl (named as validation or test)")


def test_other_sets_of_rows_in_one_file_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"train": pairs(20), "test": pairs(3), "authors": ["a"]}))
    prepared = prepare_dataset(recipe(Source(path=str(path))), family("chatml"))
    assert prepared.counts.rows == 20
    assert prepared.source_notes == (f"{path}: sets.json: not read: the rows under 'test'",)


def test_any_change_makes_another_set(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(20))
    base = prepare_dataset(recipe(source), family("chatml"))
    others = [
        prepare_dataset(recipe(source, max_length=16, overflow="cut-left"), family("chatml")),
        prepare_dataset(recipe(source, train_on="everything"), family("chatml")),
        prepare_dataset(recipe(source, validation_fraction=0.5), family("chatml")),
        prepare_dataset(recipe(source, seed=7), family("chatml")),
        prepare_dataset(recipe(source), family("strips")),
        prepare_dataset(recipe(write(tmp_path / "b.jsonl", pairs(21))), family("chatml")),
    ]
    assert len({other.data_hash for other in (base, *others)}) == 7
    assert not any(other.cached for other in others)


def test_the_same_content_elsewhere_is_the_same_set(tmp_path: Path) -> None:
    first = prepare_dataset(recipe(write(tmp_path / "a.jsonl", pairs(20))), family("chatml"))
    again = prepare_dataset(recipe(write(tmp_path / "moved.jsonl", pairs(20))), family("chatml"))
    assert again.cached
    assert again.data_hash == first.data_hash


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half a record": lambda folder: (folder / "meta.json").write_text('{"half'),
    "no tokens": lambda folder: (folder / "tokens.u32").unlink(),
    "fewer tokens": lambda folder: os.truncate(folder / "tokens.u32", 40),
    "a flipped byte": lambda folder: flip(folder / "tokens.u32", 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    settings = recipe(write(tmp_path / "a.jsonl", pairs(20)))
    first = prepare_dataset(settings, family("chatml"))
    DAMAGE[damage](first.folder)
    again = prepare_dataset(settings, family("chatml"))
    assert not again.cached and again.data_hash == first.data_hash
    assert prepare_dataset(settings, family("chatml")).cached


def test_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    rows = [row for row in pairs(50) for _ in range(4)]
    random.Random(1).shuffle(rows)
    prepared = prepare_dataset(
        recipe(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2), family("chatml")
    )
    train, validation = Counter(side(prepared, "train")), Counter(side(prepared, "validation"))
    assert not train.keys() & validation.keys()
    assert sum(validation.values()) == 40


def test_near_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    chance = random.Random(2)
    texts = [" ".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=40)) for _ in range(40)]
    rows = [{"prompt": f"{text} {end}", "completion": text[:3]} for text in texts for end in ("one", "two")]
    prepared = prepare_dataset(
        recipe(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2), family("chatml")
    )
    held = {prepared.validation.origin(i)[1] - 1 for i in range(len(prepared.validation))}
    assert len(held) == 16
    assert {row ^ 1 for row in held} == held


def test_every_source_gives_its_share_to_validation(tmp_path: Path) -> None:
    many, few = write(tmp_path / "a.jsonl", pairs(200)), write(tmp_path / "b.jsonl", pairs(20, "other"))
    prepared = prepare_dataset(recipe(many, few, validation_fraction=0.1), family("chatml"))
    shares = Counter(prepared.validation.origin(i)[0] for i in range(len(prepared.validation)))
    assert shares == {0: 20, 1: 2}


def test_the_seed_decides_the_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", pairs(60))
    one, other = (prepare_dataset(recipe(source, seed=seed), family("chatml")) for seed in (1, 2))
    assert side(one, "validation") != side(other, "validation")


def test_a_validation_file_is_used_whole_and_overlap_reported(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [*pairs(3, "held"), pairs(1)[0]])
    prepared = prepare_dataset(
        recipe(write(tmp_path / "a.jsonl", pairs(10)), validation_path=held.path), family("chatml")
    )
    assert len(prepared.train) == 10
    assert len(prepared.validation) == 4
    overlap = next(p for p in prepared.problems if p.kind == "overlap")
    assert (overlap.source, overlap.rows) == (1, (4,))
    clean = write(tmp_path / "clean.jsonl", pairs(3, "held"))
    assert not prepare_dataset(
        recipe(write(tmp_path / "a.jsonl", pairs(10)), validation_path=clean.path), family("chatml")
    ).problems


def test_weights_say_how_often_a_source_is_seen(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", pairs(10))
    twice = Source(path=write(tmp_path / "b.jsonl", pairs(10, "b")).path, weight=2)
    half = Source(path=write(tmp_path / "c.jsonl", pairs(10, "c")).path, weight=0.5)
    train = prepare_dataset(recipe(one, twice, half, validation_fraction=0), family("chatml")).train
    epochs = [train.epoch(epoch, seed=3) for epoch in range(2)]
    for epoch in epochs:
        assert Counter(train.origin(i)[0] for i in epoch) == {0: 10, 1: 20, 2: 5}
    assert epochs[0] != epochs[1]
    assert epochs[0] == train.epoch(0, seed=3)
    seen = Counter(i for epoch in epochs for i in epoch if train.origin(i)[0] == 2)
    assert len(seen) == 10
    assert set(seen.values()) == {1}


def test_weights_of_answers_are_kept_beside_the_tokens(tmp_path: Path) -> None:
    weights = [1, 1, 0.5, 0, 1, 2]
    question = {"role": "user", "content": "q"}
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": f"a{n}", "weight": weight} for n, weight in enumerate(weights)
    ]
    rows = [{"messages": [question, answer]} for answer in answers]
    source = write(tmp_path / "a.jsonl", rows)
    prepared = prepare_dataset(recipe(source, validation_fraction=0), family("chatml"))
    train = prepared.train
    stored = {train.origin(i)[1] - 1: set(train.weights(i) or ()) - {0.0} for i in range(len(train))}
    assert stored == {0: {1.0}, 1: {1.0}, 2: {0.5}, 4: {1.0}, 5: {2.0}}
    for answer in answers:
        answer["weight"] = 1
    plain = prepare_dataset(
        recipe(write(tmp_path / "b.jsonl", rows), validation_fraction=0), family("chatml")
    ).train
    assert plain.weights(0) is None
    (prepared.folder / "weights.f32").write_bytes(b"")
    assert not prepare_dataset(recipe(source, validation_fraction=0), family("chatml")).cached


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    reports: list[PrepareProgress] = []
    prepare_dataset(recipe(write(tmp_path / "a.jsonl", pairs(600))), family("chatml"), reports.append)
    assert reports[-1].share == 1.0
    assert reports[-1].rows == 600
    assert [p.rows for p in reports] == sorted(p.rows for p in reports)


def test_a_row_error_blocks_and_names_file_row_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 6 + "oops\n")
    with pytest.raises(UserError, match="Not valid JSON") as caught:
        prepare_dataset(recipe(Source(path=str(path))), family("chatml"))
    assert str(path) in caught.value.what
    assert "Line 7" in caught.value.what
    assert caught.value.fix


def test_a_bad_rows_file_within_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    write(tmp_path / "b.jsonl", [pairs(1)[0], {"prompt": [{"type": "image"}], "completion": "x"}])
    with pytest.raises(UserError) as caught:
        prepare_dataset(recipe(Source(path=str(tmp_path))), family("chatml"))
    assert str(tmp_path / "b.jsonl") in caught.value.what
    assert "row 2" in caught.value.what


@pytest.mark.parametrize(
    ("rows", "data", "fix"),
    [
        (pairs(3), {"max_length": 16, "overflow": "drop"}, "data.overflow"),
        ([{"prompt": "word " * 99, "completion": "x"}], {"max_length": 16}, "beyond the cut"),
        ([{"prompt": "a", "completion": " "}], {}, "data inspect"),
    ],
)
def test_nothing_to_train_on_says_why(
    tmp_path: Path, rows: list[Any], data: dict[str, Any], fix: str
) -> None:
    with pytest.raises(UserError, match="Nothing to train on") as caught:
        prepare_dataset(recipe(write(tmp_path / "a.jsonl", rows), **data), family("chatml"))
    assert fix in caught.value.fix


def test_a_run_whose_rows_are_all_excluded_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", pairs(3))
    source = Source(path=str(tmp_path / "a.jsonl"), excluded_rows="1-9")
    with pytest.raises(UserError) as caught:
        prepare_dataset(recipe(source), family("chatml"))
    assert "All 3 rows" in caught.value.what and "excluded_rows" in caught.value.fix


def test_no_source_says_so() -> None:
    with pytest.raises(UserError, match="No data"):
        prepare_dataset(Recipe(), family("chatml"))


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    rows, other_rows = pairs(40, "old"), pairs(40, "new")
    source = write(path, rows)

    def save_then_make(*arguments: Any) -> None:
        write(path, other_rows)
        make(*arguments)

    make = dataset._make
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_make", save_then_make)
        with pytest.raises(UserError) as refused:
            prepare_dataset(recipe(source), family("chatml"))
    assert refused.value.title == "The data changed while it was read"
    assert str(path) in refused.value.what
    write(path, rows)
    prepared = prepare_dataset(recipe(source), family("chatml"))
    assert not prepared.cached
    assert all("old" in text for text in side(prepared, "train"))


def test_a_change_that_preserves_the_mtime_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    source = write(path, pairs(40, "old"))
    before = path.stat()

    def save_then_make(*arguments: Any) -> None:
        write(path, pairs(40, "new"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        make(*arguments)

    make = dataset._make
    monkeypatch.setattr(dataset, "_make", save_then_make)
    with pytest.raises(UserError, match="The data changed while it was read"):
        prepare_dataset(recipe(source), family("chatml"))


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_tui.data.dataset._make", full)
    with pytest.raises(UserError, match="No disk space"):
        prepare_dataset(recipe(write(tmp_path / "a.jsonl", pairs(3))), family("chatml"))


def test_left_over_work_of_a_killed_process_does_not_disturb(tmp_path: Path) -> None:
    small_recipe = recipe(write(tmp_path / "a.jsonl", pairs(20)))
    folder = prepare_dataset(small_recipe, family("chatml")).folder
    (folder.parent / ".making-dead").mkdir()
    assert prepare_dataset(small_recipe, family("chatml")).cached
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["SHA256SUMS", "meta.json", "offsets.u64", "rows.u32", "sources.u16", "tokens.u32", "train.u32",
         "trained.u8", "trained_counts.u32", "validation.u32"]
    )  # fmt: skip
    assert Store(folder).tokens.readonly


def test_sets_nobody_asks_for_are_deleted_in_the_end(tmp_path: Path) -> None:
    old = prepare_dataset(recipe(write(tmp_path / "a.jsonl", pairs(20))), family("chatml")).folder
    fresh = prepare_dataset(recipe(write(tmp_path / "b.jsonl", pairs(21))), family("chatml")).folder
    for mine in ("notes", "0" * 32):
        (old.parent / mine).mkdir()
    os.utime(old / "meta.json", (0, 0))
    prepare_dataset(recipe(write(tmp_path / "c.jsonl", pairs(22))), family("chatml"))
    assert (old.exists(), fresh.exists()) == (False, True)
    assert (old.parent / "notes").exists() and (old.parent / ("0" * 32)).exists()


def test_a_set_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    small_recipe = recipe(write(tmp_path / "a.jsonl", pairs(20)))
    folder = prepare_dataset(small_recipe, family("chatml")).folder
    os.utime(folder / "meta.json", (0, 0))
    assert prepare_dataset(small_recipe, family("chatml")).cached
    prepare_dataset(recipe(write(tmp_path / "b.jsonl", pairs(21))), family("chatml"))
    assert folder.exists()


SAMPLE = TokenizedSample(list(range(10)), b"\x00\x00\x00\x01\x01\x00\x00\x00\x01\x01")


@pytest.mark.parametrize(
    ("too_long", "pieces"),
    [
        ("drop", []),
        ("cut-right", [[0, 1, 2, 3]]),
        ("cut-left", [[6, 7, 8, 9]]),
        ("split", [[0, 1, 2, 3], [5, 6, 7, 8]]),
    ],
)
def test_long_samples_are_fitted_as_the_recipe_says(too_long: Any, pieces: list[list[int]]) -> None:
    fitted = truncate(SAMPLE, 4, too_long)
    assert [s.token_ids for s in fitted] == pieces
    assert all(len(s.loss_mask) == len(s.token_ids) for s in fitted)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(8, 60),
    st.integers(0, 5),
)
def test_a_split_piece_starts_within_a_turn_only_if_necessary(
    turns: list[tuple[int, int]], limit: int, tail: int
) -> None:
    loss_mask = b"".join(bytes(question) + b"\x01" * said for question, said in turns) + bytes(tail)
    ids = list(range(len(loss_mask)))
    length_of_turn = [question + said for question, said in turns for _ in range(question + said)]
    begins = set(accumulate((question + said for question, said in turns), initial=0))
    end = 0
    for piece in truncate(TokenizedSample(ids, loss_mask), limit, "split"):
        first, last = piece.token_ids[0], piece.token_ids[-1]
        assert end <= first and len(piece.token_ids) <= limit and 1 in piece.loss_mask[1:]
        assert piece.token_ids == ids[first : last + 1] and piece.loss_mask == loss_mask[first : last + 1]
        assert first in begins or length_of_turn[first] > limit
        end = last + 1


def test_a_conversation_is_split_after_answers() -> None:
    turns = [(6, 4), (5, 5), (3, 3)]
    loss_mask = b"".join(bytes(question) + b"\x01" * said for question, said in turns)
    pieces = truncate(TokenizedSample(list(range(26)), loss_mask), 18, "split")
    assert [(p.token_ids[0], p.token_ids[-1]) for p in pieces] == [(0, 9), (10, 25)]


def test_an_overlong_questions_end_stays_with_its_answer() -> None:
    loss_mask = bytes(50) + b"\x01" * 6 + bytes(4)
    (piece,) = truncate(TokenizedSample(list(range(60)), loss_mask), 20, "split")
    assert (piece.token_ids[0], piece.token_ids[-1]) == (36, 55)
    loss_mask = bytes(50) + b"\x01" * 40
    pieces = truncate(TokenizedSample(list(range(90)), loss_mask), 20, "split")
    assert [p.token_ids[0] for p in pieces] == [40, 60, 80]


def test_cutting_at_the_left_keeps_the_begin_token() -> None:
    fitted = truncate(SAMPLE, 4, "cut-left", bos_id=0)[0]
    assert fitted.token_ids == [0, 7, 8, 9]
    assert fitted.loss_mask == b"\x00\x00\x01\x01"


def test_fitting_samples_are_unchanged_and_samples_without_answer_are_dropped() -> None:
    assert truncate(SAMPLE, 10, "drop") == [SAMPLE]
    assert truncate(SAMPLE, 3, "cut-right") == []
    assert truncate(TokenizedSample([1, 2], b"\x00\x00"), 10, "drop") == []
