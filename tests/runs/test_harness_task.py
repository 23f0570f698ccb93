"""Task files of lm-eval: what is read of them, and what is refused before anything could run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.cli import main
from qlora_tui.errors import UserError
from qlora_tui.installation import install_command
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.harness import harness_job
from qlora_tui.runs.harness.harness_evaluation import (
    HarnessResult,
    compare_samples,
    read_results,
    store_results,
)
from qlora_tui.runs.harness.harness_task import read_harness_tasks
from qlora_tui.runs.harness.harness_templates import UnsafeTemplateError, check_template, sandbox
from qlora_tui.runs.task_metrics.intervals import paired_share_interval
from qlora_tui.runs.task_metrics.task_evaluation import adapter_hash

CHOICE = """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: [red, blue]
doc_to_target: label
"""


def a_task(folder: Path, text: str = CHOICE, name: str = "colors.yaml") -> Path:
    (folder / "rows.jsonl").write_text('{"question": "what is a fox", "label": 0}\n')
    (folder / name).write_text(text)
    return folder / name


def test_a_task_keeps_only_what_was_checked(tmp_path: Path) -> None:
    base = "target_delimiter: ' '\nmetadata: {version: 1}\n"
    (tmp_path / "base.yaml").write_text(base)
    a_task(tmp_path, f"include: base.yaml\n{CHOICE}")
    (task,) = read_harness_tasks(tmp_path)
    assert task.name == "colors" and task.data_files == {"test": (tmp_path / "rows.jsonl",)}
    assert task.config["target_delimiter"] == " "
    assert [metric["metric"] for metric in task.config["metric_list"]] == ["acc", "acc_norm"]
    assert not {"include", "metadata", "dataset_path", "dataset_kwargs"} & set(task.config)


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ("process_results: !function utils.run", "!function"),
        ("process_docs: !function utils.run", "!function"),
        ("weight: !!python/object/apply:os.system [id]", "no YAML that is read"),
        ("class: !function my.Task", "!function"),
        ("class: my.Task", "class"),
        ("custom_dataset: my.rows", "custom_dataset"),
        ("process_docs: utils.run", "process_docs"),
        ("unsafe_code: true", "unsafe_code"),
        ("use_prompt: promptsource:all", "use_prompt"),
        ("doc_to_image: image", "doc_to_image"),
        ("group: all", "group"),
        ("python_module: os", "python_module"),
        ("dataset_name: en", "dataset_name: en"),
        ("metric_list: [{metric: bleu}]", "metric_list: bleu"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric_list: hf_evaluate"),
        ("metric_list: [{metric: !function my.metric}]", "!function"),
        ("filter_list: [{name: x, filter: [{function: custom, filter_fn: f}]}]", "filter_list: custom"),
        ("fewshot_config: {sampler: my.Sampler}", "sampler: my.Sampler"),
        ("fewshot_config: {process_docs: my.docs}", "fewshot_config: process_docs"),
        ("fewshot_config: {doc_to_text: \"{{''.__class__}}\"}", "fewshot_config: doc_to_text"),
        ("generation_kwargs: {do_sample: true}", "do_sample"),
        ("generation_kwargs: {max_gen_toks: 100000}", "max_gen_toks"),
        ("num_fewshot: 100000", "num_fewshot"),
        ("a: &a [1]\nb: *a", r"colors.yaml: \*"),
        ("description: \"{{ cycler.__init__.__globals__.os.popen('id').read() }}\"", "description"),
        ("description: \"{% include 'secret' %}\"", "description"),
        ("description: \"{{ ''['__class__'] }}\"", "description"),
    ],
)
def test_what_would_run_code_is_refused_by_name(tmp_path: Path, more: str, refused: str) -> None:
    with pytest.raises(UserError, match=refused) as caught:
        read_harness_tasks(a_task(tmp_path, f"{CHOICE}{more}\n"))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("line", "instead", "refused"),
    [
        ("dataset_path: json", "dataset_path: allenai/ai2_arc", "dataset_path: allenai/ai2_arc"),
        ("dataset_path: json", "dataset_path: ./loader.py", "dataset_path: ./loader.py"),
        ("test: rows.jsonl", "test: 'https://example.com/rows.jsonl'", "data_files: https"),
        ("test: rows.jsonl", "test: missing.jsonl", "data_files: missing.jsonl"),
        ("test: rows.jsonl}", "test: rows.jsonl}, trust_remote_code: true", "trust_remote_code"),
        ("test_split: test", "test_split: validation", "test_split: validation"),
        ("test_split: test", "", "test_split"),
        ("output_type: multiple_choice", "output_type: loglikelihood_rolling", "output_type"),
        ("task: colors", "task: [arc_easy, mmlu]", "task is refused"),
    ],
)
def test_data_from_elsewhere_is_refused(tmp_path: Path, line: str, instead: str, refused: str) -> None:
    assert line in CHOICE
    with pytest.raises(UserError, match=refused):
        read_harness_tasks(a_task(tmp_path, CHOICE.replace(line, instead)))


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    a_task(tmp_path)
    a_task(tmp_path, name="more.yml")
    with pytest.raises(UserError, match="Another file has this name"):
        read_harness_tasks(tmp_path)
    with pytest.raises(UserError, match="no task file"):
        read_harness_tasks(tmp_path / ".." / tmp_path.name / "..")


def test_templates_are_rendered_in_a_sandbox() -> None:
    render = sandbox().from_string("{{ x | regex_replace('a+', 'b') }}\n").render
    assert render(x="caat") == "cbt\n"
    for text in ("{{ x._y }}", "{{ x['__class__'] }}", "{{ _x }}", "{% import 'a' as b %}", "{{ x"):
        with pytest.raises(UnsafeTemplateError):
            check_template(text)
    check_template("Q: {{question}}\n{{ '____' }} {% for c in choices %}{{c.text}}{% endfor %}")


def records(values: list[float], filter_: str = "none") -> list[dict[str, Any]]:
    return [
        {
            "doc_id": number,
            "filter": filter_,
            "metrics": ["acc"],
            "acc": value,
            "target": 1,
            "filtered_resps": [(-1.5, False), (-0.25, True)],
        }
        for number, value in enumerate(values)
    ]


def test_results_of_both_sides_are_paired_and_kept(run: RunDir) -> None:
    run.adapter_dir.mkdir(parents=True, exist_ok=True)
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"x")
    metrics, answers = compare_samples(records([0.0] * 12), records([1.0] * 10 + [0.0] * 2)[::-1])
    (metric,) = metrics
    assert (metric.name, metric.rows, metric.base, metric.comparison) == ("acc", 12, 0.0, "better")
    halves = [1.0] * 6 + [0.0] * 6
    (same,), _ = compare_samples(records(halves), records(halves)[::-1])
    right = [value == 1.0 for value in halves]
    assert same.difference_interval == paired_share_interval(right, right)
    assert answers[0].row == 1 and answers[0].base == "-1.50, -0.25"
    result = HarnessResult(
        task="colors",
        adapter=adapter_hash(run),
        chat=False,
        rows=12,
        metrics=metrics,
        answers=answers,
        seconds=1.0,
    )
    store_results(run, [result])
    store_results(run, [HarnessResult(**{**_fields(result), "task": "other"})])
    assert [each.task for each in read_results(run)] == ["colors", "other"]
    whole = run.harness_results_path.read_bytes()
    run.harness_results_path.write_bytes(whole[:-1])
    store_results(run, [result])
    assert (run.path / "damaged-harness_results.json").read_bytes() == whole[:-1]
    store_results(run, [HarnessResult(**{**_fields(result), "task": "other"})])
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"another")
    assert read_results(run) == ()


def test_a_missing_extra_is_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness_job, "find_spec", lambda name: None)
    assert main(["evaluate", run.id, "--tasks", str(a_task(tmp_path))]) == 1
    assert install_command("qlora-tui[lm-eval]") in capsys.readouterr().err
    assert json.loads((tmp_path / "rows.jsonl").read_text())["label"] == 0


def _fields(result: HarnessResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__struct_fields__}
