"""Answers of base and adapter at the end of a run: what they cost, and what they leave alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.task_answers import answer_prompts
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.recipe.schema import Data, Quantization, Source
from qlora_tui.runs.describe import describe
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import AnswersCompared
from qlora_tui.runs.task_metrics.decisions import read_decider
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, read_task_evaluation, report_lines
from qlora_tui.training.answer_comparison import answer_validation, report_answers

pytestmark = pytest.mark.slow

LOSS = LossChange.of([2.0] * 6, [1.0] * 6, [1] * 6)
LABELS = tuple("red" if number % 2 else "blue" for number in range(12))
TOWNS = tuple(f"town {number}" for number in range(12))


@pytest.fixture(scope="module")
def ended(tiny_source: ChatSource, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """Makes the end of a run on answers: ``ended(answers)``."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(tiny_source.recipe.model.id)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tiny_source.adapters["adapter"])
    tokenizer = ChatTokenizer.from_folder(folder, tiny_source.recipe.model.chat_template)

    def make(*answers: str, task_prompts: int = 64) -> Ended:
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rows = [{"instruction": f"what is fox {n}", "output": answer} for n, answer in enumerate(answers)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(path=str(path))
        recipe = msgspec.structs.replace(
            tiny_source.recipe,
            quantization=Quantization(method="none", compute_dtype="float32"),
            data=Data(sources=(source,), validation_path=str(path)),
        )
        run = create_run(recipe)
        shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
        return Ended(run, model, tokenizer, task_prompts)

    return make


class Ended:
    """A run whose model is loaded and whose adapter is written."""

    def __init__(self, run: RunDir, model: Any, tokenizer: ChatTokenizer, task_prompts: int) -> None:
        self.run = run
        self.model = model
        self.lines: list[str] = []
        self.events: list[Any] = []
        recipe = run.recipe()
        training = msgspec.structs.replace(recipe.training, task_prompts=task_prompts)
        self.context: Any = SimpleNamespace(
            directory=run,
            model=model,
            data=prepare_dataset(recipe, tokenizer),
            recipe=msgspec.structs.replace(recipe, training=training),
            tokenizer=tokenizer,
            device=SimpleNamespace(torch_device=torch.device("cpu"), dtype=torch.float32),
            reporter=SimpleNamespace(
                phase=lambda phase, detail: None,
                progress=lambda phase, done, total: None,
                log=self.lines.append,
                emit=self.events.append,
            ),
        )

    def compare(self, training_seconds: float = 1e6, tick: float = 0.0) -> None:
        """Compare the answers; each look at the clock takes ``tick`` seconds."""
        ticks = count()
        answers = answer_validation(self.context, training_seconds, lambda: tick * next(ticks))
        report_answers(self.context, answers, LOSS)


@pytest.mark.parametrize(("answers", "metric"), [(LABELS, "accuracy"), (TOWNS, "exact match")])
def test_answers_at_the_end_are_those_of_evaluate(
    ended: Callable[..., Ended], answers: tuple[str, ...], metric: str
) -> None:
    end = ended(*answers)
    weights = {name: each.clone() for name, each in end.model.named_parameters() if "lora" in name}
    random_state = torch.get_rng_state()
    end.compare()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert weights and all(torch.equal(end.model.get_parameter(name), each) for name, each in weights.items())
    at_end = read_task_evaluation(end.run)
    assert not end.lines
    (event,) = end.events
    answer_prompts(end.run, 64)
    later = read_task_evaluation(end.run)
    assert at_end is not None and later is not None
    assert at_end.rows == later.rows and at_end.metrics == later.metrics and not at_end.is_partial
    assert at_end.loss == LOSS and at_end.is_of_run
    assert any("Validation loss" in line for line in report_lines(at_end, 0))
    assert isinstance(event, AnswersCompared) and event.metric == metric and event.prompts == 12
    assert describe(event, 1).startswith(f"answers to 12 validation prompts: {metric} ")
    assert (read_decider(end.run.adapter_dir) is not None) == (at_end.decisions is not None)
    assert (at_end.decisions is not None) == (answers == LABELS)


def test_what_is_not_answered_in_time_is_left_out(ended: Callable[..., Ended]) -> None:
    end = ended(*TOWNS)
    # Seven looks at the clock are within 3 %: both answers to the first eight prompts take five.
    end.compare(training_seconds=7 / 0.03, tick=1.0)
    partial = read_task_evaluation(end.run)
    assert partial is not None and partial.is_partial and len(partial.rows) == 8
    late = ended(*TOWNS)
    late.compare(training_seconds=3 / 0.03, tick=1.0)
    assert "0 of 12 prompts were answered within 3% of the training time" in late.lines[0]
    short = ended(*TOWNS)
    short.compare(training_seconds=10.0)
    assert "3% of such a short run is not enough time" in short.lines[0]
    assert not late.events and not short.events and read_task_evaluation(short.run) is None


@pytest.mark.parametrize(
    ("answers", "task_prompts"),
    [(("the fox that sat in the old oak said that it was red " * 2,) * 8, 64), (LABELS, 0), (LABELS[:4], 64)],
)
def test_free_text_and_few_rows_are_not_answered(
    ended: Callable[..., Ended], answers: tuple[str, ...], task_prompts: int
) -> None:
    end = ended(*answers, task_prompts=task_prompts)
    end.compare()
    assert not end.events and not end.lines and read_task_evaluation(end.run) is None


def test_an_error_costs_the_answers_and_not_the_run(ended: Callable[..., Ended]) -> None:
    end = ended(*LABELS)
    end.context.model = SimpleNamespace()
    end.compare()
    assert end.lines[0].startswith("the answers were not compared: AttributeError")
