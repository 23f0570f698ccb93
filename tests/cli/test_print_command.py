"""The command that trains a run on several GPUs, and the run it is for."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import all_runs, find_run
from qlora_tui.runs.status import RESUMABLE, read_status
from tests.cli.conftest import Call
from tests.data.families import tokenizer_json
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.tui.sample_data import readable_model, ticket, write_rows


@pytest.fixture
def train(qwen: Path) -> list[str]:
    """``train`` with a model folder that passes the checks."""
    (qwen / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (qwen / "tokenizer.json").write_text(tokenizer_json())
    data = qwen.parent / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    return ["train", "--model", str(qwen), "--data", str(data)]


@pytest.mark.slow
def test_the_printed_command_starts_one_trainer_per_gpu(
    call: Call, train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TUI_CPU_PROCESSES", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = call(*train, "--print-command", "--gpus", "4", "--json").json
    run = find_run("last")
    env, threads, launcher, *words = shlex.split(said["command"])
    assert env == "env" and threads.startswith("OMP_NUM_THREADS=")
    assert Path(launcher).exists()
    assert words[-3:] == ["-m", "qlora_tui.training", str(run.path)]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert run_queue.waiting() == []
    status = read_status(run)
    assert status.state in RESUMABLE and "start it with the command that" in status.detail
    attached = call("attach", "last")
    assert attached.code == 0 and "stopped at step 0" in attached.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("quantization.streamed_layers=2", "training.gpus = 1 or quantization.streamed_layers = 0"),
        ("lora.train_embeddings=true", "training.gpus = 1 or lora.train_embeddings = false"),
    ],
)
def test_settings_for_one_gpu_are_refused_with_several(
    call: Call, train: list[str], setting: str, fix: str
) -> None:
    streamed = [*train, "--print-command", "--set", setting]
    refused = call(*streamed, "--gpus", "2")
    assert refused.code == 2 and "needs a single GPU" in refused.err
    assert fix in refused.err
    assert all_runs() == []
    assert call(*streamed, "--gpus", "1").code == 0


@pytest.mark.slow
def test_every_gpu_is_used_unless_told_and_no_more(
    call: Call, train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [*train, "--print-command", "--gpus", "all", "--json"]
    assert call(*everything).json["gpus"] == 1
    install_nvml_stub(monkeypatch, "two_gpus")
    install_torch(monkeypatch, "12.4")
    told = call(*everything)
    assert told.json["gpus"] == 2 and "RTX 4090) and GPU 1 (RTX 3060) differ" in told.err
    runs = len(all_runs())
    for words in (["--gpus", "3"], ["--gpus", "2", "--gpu", "1"], ["--gpus", "2", "--gpu", "cpu"]):
        refused = call(*train, *words)
        assert refused.code == 2 and "Not enough GPUs" in refused.err
    assert len(all_runs()) == runs


@pytest.mark.slow
def test_a_gpu_that_torch_cannot_use_refuses_a_run(
    call: Call, train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    install_torch(monkeypatch, None)
    refused = call(*train, "--print-command")
    assert refused.code == 1 and "torch cannot use the GPU" in refused.err and all_runs() == []
    missing = call(*train, "--print-command", "--gpu", "5090")
    assert missing.code == 2 and '--gpu is "5090"' in missing.err and all_runs() == []


@pytest.mark.slow
def test_the_chosen_gpu_is_stored_with_the_run(
    call: Call, train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml_stub(monkeypatch, "one_gpu")
    assert call("--gpu", "cpu", *train, "--print-command").code == 0
    run = find_run("last")
    assert run.gpu == "cpu"
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    assert call("resume", run.id, "--gpu", "0").code == 0
    assert run.gpu == "0"
    monkeypatch.delenv("QLORA_TUI_GPU")
    run_queue.cancel(run)
    assert call("resume", run.id).code == 0 and run.gpu == "0"


def test_wrong_numbers_of_gpus_are_refused(call: Call, train: list[str]) -> None:
    for words in (["--gpus", "two"], ["--gpus", "0", "--print-command"], ["--detach", "--print-command"]):
        assert call(*train, *words).code == 2
    assert all_runs() == []


@pytest.mark.slow
def test_a_dry_run_says_steps_and_time_and_creates_nothing(call: Call, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [ticket(number) for number in range(64)])
    dry_run = ["train", "--model", readable_model(tmp_path), "--data", str(data), "--dry-run"]
    settings = ["--set", "data.packing=false", "--set", "data.validation_fraction=0"]
    said = call(*dry_run, *settings)
    assert said.code == 0
    assert "16 steps, their time is unknown" in said.out and "Nothing was queued." in said.out
    known = call(*dry_run, *settings, "--json").json
    assert (known["ok"], known["steps"], known["steps_are_exact"]) == (True, 16, True)
    too_long = call(*dry_run, "--set", "data.max_length=16", "--set", "data.overflow=drop")
    assert too_long.code == 1 and "error    data: None of the 64 rows yields a sample" in too_long.out
    assert all_runs() == []
