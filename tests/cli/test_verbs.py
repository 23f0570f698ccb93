"""Every command prints something useful, and the same as JSON."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from qlora_tui import paths, worker
from qlora_tui.catalog import hub
from qlora_tui.cli.main import command_parser, main
from qlora_tui.formatting import format_path
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import actions, doctor, run_queue
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Failed, Finished, Started
from qlora_tui.runs.status import Status, write_status
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.settings import GPU_VARIABLE, config_path
from qlora_tui.training.gguf_conversion import folder_of
from qlora_tui.tui.app import QloraApp
from tests.cli.conftest import CONFIGS, Call
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.support.step_events import a_step
from tests.support.task_evaluations import a_row, put_evaluation
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def finished_run() -> RunDir:
    recipe = Recipe(name="owls", model=Model(id="acme/tiny"), data=Data(sources=(Source(path="owls.jsonl"),)))
    run = create_run(recipe)
    with EventWriter(run.events_path) as log:
        log.append(Started(at=1.0, attempt=1, pid=1))
        for number in (1, 2, 3):
            log.append(a_step(number, loss=None if number == 2 else 2.5, tokens=100))
        log.append(Finished(at=4.0, step=3, seconds=3.0, tokens_per_s=50.0))
    write_status(run, Status(state="finished", at=4.0, step=3, total_steps=3, loss=2.5))
    return run


def test_locate_names_directories_that_are_private(call: Call) -> None:
    places = call("locate", "--json").json
    assert Path(places["runs"]) == paths.runs_dir()
    assert all(Path(place).is_dir() for place in places.values())


def test_the_doctor_looks_at_the_disks_where_things_will_lie(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "check_libraries", lambda on_cpu: [])  # another test's, and slow
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    texts = {check["name"]: check["text"] for check in call("doctor", "--json").json["checks"]}
    for name, folder in (
        ("disk for runs", paths.state_dir()),
        ("disk for downloaded models", tmp_path / "elsewhere/huggingface/hub"),
        ("disk for converted models and data", tmp_path / "elsewhere/qlora-tui"),
    ):
        assert format_path(folder) in texts[name]


@pytest.mark.parametrize("choice", ["1", "7"])
@pytest.mark.slow
def test_the_doctor_reports_a_gpu_that_is_not_there_once(
    call: Call, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    install_torch(monkeypatch, "12.4")
    monkeypatch.setattr("qlora_tui.runs.doctor.run_job", self_test)
    monkeypatch.setenv(GPU_VARIABLE, choice)
    checks = {check["name"]: check for check in call("doctor", "--json").json["checks"]}
    assert [name for name, check in checks.items() if check["outcome"] == "error"] == ["GPU"] * (
        choice == "7"
    )
    assert ('"7", which matches none of the GPUs: 0: RTX 4090' in checks["GPU"]["text"]) == (choice == "7")
    assert checks["training"]["text"] == ("cpu" if choice == "7" else choice)


def self_test(*arguments: object, environ: dict[str, str], **options: object) -> list[Check]:
    """Answer as the self-test does: with the GPU that it was given."""
    return [Check(CheckKind.LIBRARY, "ok", environ[GPU_VARIABLE], name="training")]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ['["nope"]', '"nope"'])
def test_an_estimate_for_a_gpu_that_cannot_be_chosen_is_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    config_path().write_text(f"gpu = {setting}\n")
    estimate = call("estimate", "--model", str(CONFIGS / "LiquidAI__LFM2-350M.json"))
    assert estimate.code != 0 and "config.toml" in estimate.err and "gpu" in estimate.err


def test_presets_are_listed_and_shown(call: Call) -> None:
    names = [preset["name"] for preset in call("presets", "--json").json["presets"]]
    assert {"balanced", "paper", "small-card", "quality", "style", "cpu-demo"} <= set(names)
    assert call("presets", "show", "paper", "--json").json["recipe"]["lora"]["rank"] == 64
    assert "rank = 64" in call("presets", "show", "paper").out


@pytest.mark.slow
def test_an_estimate_has_items_tiers_verdicts_and_what_fits(call: Call, qwen: Path) -> None:
    estimated = call("estimate", "--model", str(qwen), "--gpu-gib", "24", "--json").json
    nf4, fp16 = estimated["precisions"]["nf4"], estimated["precisions"]["fp16"]
    assert sum(nf4["items"].values()) == nf4["total_bytes"]
    assert nf4["total_bytes"] < fp16["total_bytes"]
    assert nf4["tiers"]["allocated"] <= nf4["tiers"]["reserved"] <= nf4["tiers"]["process"]
    assert nf4["verdict"] == "fits"
    assert estimated["what_fits"]["sequence_length"] > 1024


@pytest.mark.slow
def test_an_estimate_that_does_not_fit_names_the_cheapest_change(call: Call, qwen: Path) -> None:
    said = call("estimate", "--model", str(qwen), "--gpu-gib", "8", "--set", "data.max_length=8192")
    assert "does not fit" in said.out
    assert "cheapest change that fits" in said.out


@pytest.mark.slow
def test_an_estimate_refuses_a_gpu_that_is_not_there(
    call: Call, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    refused = call("estimate", "--model", str(qwen), "--gpu", "5")
    assert refused.code == 2 and "0: RTX 4090" in refused.err
    assert "RTX 4090" in call("estimate", "--model", str(qwen), "--gpu", "4090").out


@pytest.mark.slow
def test_a_gguf_estimate_includes_the_conversion_until_converted(call: Call, tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    said = call("estimate", "--model", str(file))
    assert "Before the first run, tiny.gguf is converted in a separate process, which takes " in said.out
    peak = json.loads(call("estimate", "--model", str(file), "--json").out)["conversion"]
    assert peak["file"] == "tiny.gguf" and peak["peak_bytes"] > 50 * 2**20
    folder_of(file).mkdir()
    (folder_of(file) / "config.json").write_text("{}")
    assert "converted" not in call("estimate", "--model", str(file)).out
    assert json.loads(call("estimate", "--model", str(file), "--json").out)["conversion"] is None


def test_runs_are_listed_with_state_and_queue(call: Call, finished_run: RunDir) -> None:
    waiting = create_run(finished_run.recipe())
    run_queue.enqueue(waiting)
    listed = call("runs", "--json").json
    assert {run["run"]: run["state"] for run in listed["runs"]} == {
        finished_run.id: "finished",
        waiting.id: "queued",
    }
    assert listed["queue"] == [waiting.id]


def test_no_two_runs_can_be_given_one_name(call: Call, finished_run: RunDir) -> None:
    other = create_run(finished_run.recipe())
    assert call("runs", "rename", finished_run.id, other.id).code == 2
    assert call("runs", "rename", finished_run.id, "barn").code == 0
    assert call("runs", "rename", other.id, "barn").code == 2


def test_the_trash_is_listed_restored_and_emptied(call: Call, finished_run: RunDir) -> None:
    run = finished_run
    actions.move_to_trash(run)
    assert "The trash holds" in call("runs").out
    listed = call("runs", "trash")
    assert run.id in listed.out and "KiB" in listed.out and "ago" in listed.out
    assert call("runs", "restore", run.id[:6]).code == 0 and run.recipe_path.exists()
    assert call("runs", "restore", run.id).code == 2
    actions.move_to_trash(run)
    assert json.loads(call("runs", "trash", "--empty", "--json").out)["runs"][0]["erased"]
    assert call("runs", "trash").out == "The trash is empty.\n"


def test_deleting_a_run_in_use_needs_another_word(call: Call, finished_run: RunDir) -> None:
    run = finished_run
    handle = hold_folder(run.path)
    assert handle is not None
    refused = call("runs", "delete", run.id, "--yes")
    assert refused.code == 2 and "--in-use" in refused.err and run.path.exists()
    assert call("runs", "delete", run.id, "--yes", "--in-use").code == 0 and not run.path.exists()
    os.close(handle)


def test_a_run_is_deleted_only_with_yes(call: Call, finished_run: RunDir) -> None:
    said = call("runs", "delete", "last")
    assert said.code == 2
    assert "--yes" in said.err and finished_run.path.exists()
    assert call("runs", "delete", "last", "--yes").code == 0
    assert not finished_run.path.exists()


def test_attach_tells_a_run_from_its_first_event(call: Call, finished_run: RunDir) -> None:
    said = call("attach", "owls")
    assert said.code == 0
    assert "step 1 of" in said.out and "loss NaN" in said.out and "finished at step 3" in said.out
    events = [json.loads(line) for line in call("attach", "last", "--json").out.splitlines()]
    assert [event["event"] for event in events] == ["queued", "started", "step", "step", "step", "finished"]


def test_attach_to_a_failed_run_says_why_and_fails(call: Call, finished_run: RunDir) -> None:
    with EventWriter(finished_run.events_path) as log:
        log.append(Failed(at=5.0, title="Disk full", what="No room for step 4.", fix="Free some."))
    write_status(finished_run, Status(state="failed", at=5.0))
    said = call("attach", "owls")
    assert said.code == 1
    assert "Disk full: No room for step 4." in said.out and "Free some." in said.out


def test_a_waiting_run_is_stopped_by_leaving_the_queue(call: Call, finished_run: RunDir) -> None:
    waiting = create_run(finished_run.recipe())
    run_queue.enqueue(waiting)
    assert call("stop", waiting.id, "--json").json == {"run": waiting.id, "state": "stopped"}
    assert run_queue.waiting() == []


@pytest.mark.parametrize("words", [["stop"], ["pause"], ["ask", "checkpoint"]])
def test_what_needs_a_trainer_is_refused_without_one(
    words: list[str], call: Call, finished_run: RunDir
) -> None:
    said = call(words[0], finished_run.id, *words[1:])
    assert said.code == 2
    assert "finished" in said.err


def test_evaluate_prints_the_commands_of_lm_eval_for_the_adapter(call: Call) -> None:
    run = create_run(Recipe(name="owls"))
    loss = LossChange(rows=0, before=0.0, after=0.0, interval=None)
    put_evaluation(run, [a_row("red", "blue", "red")], loss)
    *_, blank, heading, serve_line, harness_line = call("evaluate", run.id).out.splitlines()
    assert not blank and heading.startswith("For benchmarks")
    serve, harness = map(shlex.split, (serve_line, harness_line))
    served = command_parser("serve").parse_args(serve[1:])
    assert served.runs == [run.id] and served.background
    url = f"http://{served.listen_on}:{served.port}/v1/completions"
    model = f"model={run.id},base_url={url},tokenizer={run.adapter_dir},num_concurrent=8"
    assert harness == f"lm_eval --model local-completions --model_args {model} --tasks TASKS".split()


def test_rows_of_a_folder_are_named_with_their_file(call: Call, tmp_path: Path) -> None:
    row, empty = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "", "completion": ""}\n'
    (tmp_path / "b.jsonl").write_text(row + empty)
    assert "(row 2)" in call("data", "inspect", str(tmp_path)).out
    (tmp_path / "a.jsonl").write_text(row.replace("a", "c"))
    assert "(row 2 of b.jsonl)" in call("data", "inspect", str(tmp_path)).out


@pytest.mark.slow
@pytest.mark.usefixtures("quick_trainers")
@pytest.mark.parametrize(("gib", "is_offered"), [("24", False), ("6.4", True), ("2", False)])
def test_the_exact_estimate_is_offered_where_the_limit_is_close(
    call: Call, gib: str, is_offered: bool
) -> None:
    model = str(CONFIGS / "Qwen__Qwen2.5-7B.json")
    assert ("--exact" in call("estimate", "--model", model, "--gpu-gib", gib).out) == is_offered


@pytest.mark.slow
def test_a_step_that_is_uncertain_is_traced_on_request(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = "estimate", "--model", str(CONFIGS / "LiquidAI__LFM2-350M.json"), "--gpu-gib", "24"
    call(*estimated)  # describes the model, which is a job; what follows starts none
    with monkeypatch.context() as patch:
        patch.setattr(worker, "module_argv", None)
        assert "--exact narrows the range" in call(*estimated).out
    said = call(*estimated, "--exact", "--json")
    trace, nf4 = said.json["trace"], said.json["precisions"]["nf4"]
    assert trace["precision"] == "nf4" and trace["exact"] and nf4["exact"]
    assert trace["items"]["adapter"]["traced"] == trace["items"]["adapter"]["closed_form"] > 0
    assert trace["items"]["step"]["traced"] > trace["items"]["gradients"]["traced"] > 0
    assert all(one["traced"] for one in said.json["precisions"].values())
    assert "Lfm2ShortConv" in nf4["notes"][0] and "Lfm2ShortConv" in trace["how"]


def test_json_lists_hub_models_that_cannot_be_trained(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"id": "acme/bert", "tags": [], "config": {"model_type": "bert"}}
    monkeypatch.setattr(hub, "get_json", lambda path, query: [entry])
    (model,) = call("models", "bert", "--json").json["hub"]
    assert "bert" in model["refusal"]


def test_gpu_gib_opens_the_app_with_that_gpu_size(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[QloraApp] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(QloraApp, "run", lambda app, **_: opened.append(app))
    monkeypatch.setattr(sys.modules["qlora_tui.cli.main"], "end_process", sys.exit)
    with pytest.raises(SystemExit) as ended:
        main(["--gpu-gib", "24"])
    assert ended.value.code == 0
    assert opened[0].memory_budget.bytes == 24 << 30


def test_an_unknown_command_is_answered_with_the_closest(call: Call) -> None:
    said = call("--gpu-gib", "8", "esitmate", "--model", "x")
    assert said.code == 2
    assert "'esitmate' is not a command." in said.err
    assert "Did you mean `qlora-tui estimate`?" in said.err
    assert "Did you mean" not in call("zzz").err
