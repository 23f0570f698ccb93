"""Replay: the base's answers among the training samples, their file, and what they change."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

pytest.importorskip("torch")

from qlora_tui.data.step_plan import replayed
from qlora_tui.errors import UserError
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import DataReady, Evaluated
from qlora_tui.training.forgetting import GENERAL_PROMPTS
from qlora_tui.training.replay import REPLAY_PROMPTS, ReplayRow, ReplaySamples, read_rows, write_rows
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow

ROWS = (ReplayRow("Hi", "Hello", (1, 2), (3, 4)), ReplayRow("Why", "So", (1,), (5,)))


class Eight:
    """Eight samples of three tokens, of which one is trained."""

    def __init__(self, weight: float | None = None) -> None:
        self._weight = weight

    def __len__(self) -> int:
        return 8

    def token_ids(self, i: int, /) -> list[int]:
        return [i, i, i]

    def loss_mask(self, i: int, /) -> list[int]:
        return [0, 0, 1]

    def weights(self, i: int, /) -> list[float] | None:
        return None if self._weight is None else [0.0, 0.0, self._weight]

    def length(self, i: int, /) -> int:
        return 3

    def epoch(self, epoch: int, seed: int, /) -> array[int]:
        return array("I", range(8))


def test_an_epoch_has_the_share_of_replayed_answers() -> None:
    samples = ReplaySamples(Eight(), ROWS, 0.2)
    for epoch in (0, 1):
        order = samples.epoch(epoch, 7)
        assert len(order) == 10 and sum(i >= 8 for i in order) == 2
        assert set(order) == set(range(10)) and samples.epoch(epoch, 7) == order
    assert replayed(500, 0.1) == 56 and replayed(8, 0.0) == 0


def test_a_replayed_answer_trains_on_its_answer_only() -> None:
    samples = ReplaySamples(Eight(), ROWS, 0.2)
    assert (samples.token_ids(8), samples.loss_mask(8)) == ((1, 2, 3, 4), (0, 0, 1, 1))
    assert (samples.length(9), samples.weights(9), samples.weights(0)) == (2, None, None)
    assert ReplaySamples(Eight(0.5), ROWS, 0.2).weights(9) == (0.0, 1.0)


def test_replayed_answers_are_read_back_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "replay.jsonl"
    write_rows(file, ROWS)
    assert read_rows(file) == ROWS
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="can be resumed only with the same"):
        read_rows(file)


def test_no_replay_prompt_measures_forgetting() -> None:
    assert not set(REPLAY_PROMPTS) & set(GENERAL_PROMPTS)
    assert len(set(REPLAY_PROMPTS)) == len(REPLAY_PROMPTS) == 48


def test_replay_lowers_what_overtraining_raises(recipe: MakeRecipe, trainers: Trainers) -> None:
    def curve(share: float) -> list[float]:
        settings = {"training.learning_rate": 5e-2, "training.epochs": 2.0, "training.general_prompts": 4}
        run = create_run(recipe({**settings, "training.replay_share": share}))
        assert trainers.run(run) == 0
        data = events_of(run, DataReady)[0]
        assert data.replayed == replayed(data.samples, share)
        assert run.replay_path.exists() == (share > 0)
        return [event.forgetting or 0.0 for event in events_of(run, Evaluated)]

    overtrained, with_replay = curve(0.0), curve(0.5)
    assert overtrained[0] == 0.0 and overtrained[-1] > 0.2
    assert with_replay[-1] < 0.6 * overtrained[-1]
