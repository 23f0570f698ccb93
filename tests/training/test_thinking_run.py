"""A run on a model that can think: what its data decided goes to its log, its record and the chat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import DataReady, SampleGenerated
from tests.data.thinkers import SMOLLM3
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow


def test_data_without_reasoning_trains_and_chats_without_thinking(
    recipe: MakeRecipe, trainers: Trainers, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "thinker")
    (model / "chat_template.jinja").write_text(SMOLLM3)
    settings = {"model.id": str(model), "training.epochs": 1.0, "training.sample_prompts": ("what is 3",)}
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    assert events_of(run, DataReady)[0].thinking == "off"
    assert (
        "Thinking: off for every row (enable_thinking), for none has reasoning." in run.log_path.read_text()
    )
    assert run_source(run).thinking == "off"
    thinking = create_run(recipe({**settings, "data.thinking": "on"}))
    assert trainers.run(thinking) == 0
    assert run_source(thinking).thinking == events_of(thinking, DataReady)[0].thinking == "on"
    assert events_of(run, DataReady)[0].data_hash != events_of(thinking, DataReady)[0].data_hash
    # Another prompt gives the random model another answer.
    asked_off, asked_on = (events_of(one, SampleGenerated)[0].answer for one in (run, thinking))
    assert asked_off != asked_on
