"""Tasks of lm-eval, done by base and adapter in one session; runs only where lm-eval is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("lm_eval")

from qlora_tui.chat.chat_types import BASE, ChatSource
from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Quantization
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.harness.harness_evaluation import read_results
from tests.runs.test_harness_task import CHOICE

pytestmark = pytest.mark.slow

ANSWER = """
task: sentences
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "red"
generation_kwargs: {until: ["."], max_gen_toks: 8}
"""


def rows(folder: Path, count: int) -> None:
    lines = [{"question": f"what is the colour of fox {n}", "label": n % 2} for n in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def exact_source(tiny_source: ChatSource) -> ChatSource:
    recipe = msgspec.structs.replace(
        tiny_source.recipe, quantization=Quantization(method="none", compute_dtype="float32")
    )
    return msgspec.structs.replace(tiny_source, recipe=recipe)


def test_likelihoods_and_answers_are_those_of_hflm(exact_source: ChatSource) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from qlora_tui.chat.harness_model import SessionModel, cut_at
    from qlora_tui.chat.session import load_session

    ours = SessionModel(load_session(exact_source), BASE, lambda: None)
    theirs = HFLM(pretrained=exact_source.recipe.model.id, dtype=torch.float32, device="cpu", batch_size=2)

    def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    pairs = [("what is the fox", " red"), ("the fox ", "is red and so are the owls"), ("", "red fox")]
    instances = requests("loglikelihood", *pairs)
    likelihoods, expected = ours.loglikelihood(instances), theirs.loglikelihood(instances)
    assert [each[0] for each in likelihoods] == pytest.approx([each[0] for each in expected], abs=1e-3)
    assert [each[1] for each in likelihoods] == [each[1] for each in expected]
    settings = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    prompts = requests("generate_until", ("what is the fox", settings), ("who sat in an oak", settings))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
    assert cut_at("a\nb. c", ["\n", "."]) == "a" and cut_at("a", "") == "a"


def test_tasks_compare_a_run_with_its_base(
    exact_source: ChatSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tmp_path, 8)
    (tmp_path / "colors.yaml").write_text(CHOICE)
    (tmp_path / "sentences.yaml").write_text(ANSWER)
    run = create_run(exact_source.recipe)
    shutil.copytree(exact_source.adapters["adapter"], run.adapter_dir)
    assert main(["evaluate", run.id, "--tasks", str(tmp_path), "--chat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [result["task"] for result in printed] == ["colors", "sentences"]
    assert all(result["chat"] and result["rows"] == 8 for result in printed)
    colors, sentences = read_results(run)
    assert [metric.name for metric in colors.metrics] == ["acc", "acc_norm"]
    assert colors.answers[0].base != colors.answers[0].adapter
    assert [metric.name for metric in sentences.metrics] == ["exact_match"]
    late = CHOICE.replace("[red, blue]", '"{{options}}"').replace("task: colors", "task: late")
    assert late.count("options") == 1
    lines = [{"question": "which", "options": options, "label": 0} for options in ("['a', 'b']", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "colors.yaml").rename(tmp_path / "again.yaml")
    (tmp_path / "again.yaml").write_text(
        CHOICE.replace("colors", "again").replace("{{question}}", "{{label}}")
    )
    (tmp_path / "sentences.yaml").write_text(late)
    assert main(["evaluate", run.id, "--tasks", str(tmp_path)]) == 1
    assert "sentences.yaml" in capsys.readouterr().err
    assert [result.task for result in read_results(run)] == ["colors", "sentences", "again"]


@pytest.mark.parametrize(
    ("prompt", "labels", "words"),
    [("{{missing}}", (0, 1), "'missing' is undefined"), ("{{question}}", (0, "one"), "rows.jsonl")],
)
def test_a_task_that_does_not_fit_its_rows_is_refused(
    prompt: str, labels: tuple[object, ...], words: str, tmp_path: Path
) -> None:
    from qlora_tui.chat.harness_worker import build_task
    from qlora_tui.runs.harness.harness_task import read_harness_tasks

    lines = [json.dumps({"question": "which", "label": label}) for label in labels]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "colors.yaml").write_text(CHOICE.replace("{{question}}", prompt))
    [task] = read_harness_tasks(tmp_path)
    with pytest.raises(UserError) as caught:
        build_task(task)
    assert words in caught.value.what


def test_lm_eval_renders_templates_in_the_sandbox() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    from qlora_tui.chat import harness_worker

    harness_worker.render_in_sandbox()
    assert utils.apply_template("{{ x }}", {"x": 1}) == "1"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ x.__class__.__mro__ }}", {"x": 1})
    environment = utils.env
    try:
        del utils.env
        with pytest.raises(UserError, match="not supported"):
            harness_worker.render_in_sandbox()
    finally:
        utils.env = environment
