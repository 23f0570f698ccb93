"""NEFTune beside transformers' own, in packed sequences, and in a run with other methods that resumes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Evaluated
from qlora_tui.training.embedding_noise import EmbeddingNoise
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_resume import interrupted_at

pytestmark = pytest.mark.slow

ALPHA, WIDTH = 5.0, 16


class Embedded(nn.Module):
    """Only an embedding, of zeros: its output is the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        nn.init.zeros_(self.table.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def noise_of(batch: dict[str, Any]) -> torch.Tensor:
    model = Embedded()
    noise = EmbeddingNoise(model, ALPHA)
    torch.manual_seed(1)
    with noise.scaled_for(batch):
        inside: torch.Tensor = model.table(batch["input_ids"]).detach()
    assert not model.table(batch["input_ids"]).any()
    return inside


def test_the_noise_of_a_sample_is_that_of_transformers() -> None:
    from transformers.integrations import neftune

    hook: Any = neftune.neftune_post_forward_hook
    ids = torch.arange(7)[None]
    theirs: Any = Embedded().table
    theirs.neftune_noise_alpha = ALPHA
    torch.manual_seed(1)
    expected = hook(theirs, (ids,), theirs(ids)).detach()
    noise = noise_of({"input_ids": ids, "segments": [7]})
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(noise, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_each_sample_has_the_noise_of_its_length(packed: bool) -> None:
    lengths = [2, 50]
    if packed:
        noise = noise_of({"input_ids": torch.ones(1, 52, dtype=torch.long), "segments": lengths})[0]
        parts = [noise[:2], noise[2:]]
    else:
        mask = torch.arange(50) < torch.tensor(lengths)[:, None]
        noise = noise_of({"input_ids": torch.ones(2, 50, dtype=torch.long), "attention_mask": mask.long()})
        parts = [noise[0, :2], noise[1]]
    for part, length in zip(parts, lengths, strict=True):
        largest = ALPHA / (length * WIDTH) ** 0.5
        assert 0.8 * largest < part.abs().max() <= largest


def test_a_run_with_several_methods_resumes_exactly(recipe: MakeRecipe, trainers: Trainers) -> None:
    plain = {"training.max_steps": 4, "training.checkpoint_every": 2, "training.keep_checkpoints": 9}
    schedule = {"training.lr_scheduler": "cosine_with_restarts", "training.warmup_ratio": 0.1}
    methods = {
        "training.neftune_alpha": 5.0,
        "training.lora_plus_ratio": 4.0,
        "training.optimizer": "lion",
    }
    whole = create_run(recipe({**plain, **schedule, **methods}))
    assert trainers.run(whole) == 0
    again = interrupted_at(whole, 2)
    assert trainers.run(again) == 0
    assert losses(again) == losses(whole)
    without = create_run(recipe(plain))
    assert trainers.run(without) == 0
    # The noise moves the first step's loss, and not the evaluation before it.
    assert losses(whole)[1] != losses(without)[1]
    assert events_of(whole, Evaluated)[0].loss == events_of(without, Evaluated)[0].loss
