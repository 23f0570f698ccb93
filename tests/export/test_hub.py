"""``export hub`` against a hub on this machine, with the real client."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qlora_tui import paths
from qlora_tui.chat.chat_types import ChatSource, Effect
from qlora_tui.cli.main import main
from qlora_tui.errors import UserError
from qlora_tui.gpu.torch_env import offline_variables_set
from qlora_tui.recipe.schema import Model
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, Finished
from tests.catalog.fake_hub import FakeHub, FakeRepo, serve
from tests.export.gguf_files import hide_llama_cpp

pytestmark = pytest.mark.slow

BUSY = b'{"error": "Cannot create repo: another conflicting operation is in progress"}'
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve(FakeHub()) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", served.token)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        # Set by exports of other tests in this process.
        offline_variables_set.clear()
        # Files without the comparison by llama.cpp, which other tests make.
        hide_llama_cpp(monkeypatch)
        yield served


@pytest.fixture
def run(tiny_source: ChatSource) -> RunDir:
    run = create_run(tiny_source.recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    (run.adapter_dir / "additional_chat_templates").mkdir()
    (run.adapter_dir / TOOL_TEMPLATE).write_text("{{ tools }}")
    with EventWriter(run.events_path) as log:
        for step, loss in ((0, 2.5), (4, 1.25), (8, 1.5)):
            log.append(Evaluated(at=1, step=step, loss=loss))
        log.append(Finished(at=2, step=8, seconds=1, tokens_per_s=1, energy_kwh=0.42))
    return run


def _export(run: RunDir, *arguments: str) -> int:
    return main(["export", "hub", run.id, "me/tickets", *arguments])


def _uploads() -> list[Path]:
    return list((paths.cache_dir() / "uploads").iterdir())


@pytest.mark.parametrize(
    ("form", "weights", "relation"),
    [
        ("adapter", "adapter_model.safetensors", "peft"),
        ("merged", "model.safetensors", "transformers"),
        ("gguf", "files", "gguf"),
    ],
)
def test_each_form_is_uploaded_with_a_card(
    form: str, weights: str, relation: str, hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export(run, "--form", form, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    repo = hub.repos["me/tickets"]
    assert repo.private
    assert result["url"] == f"{hub.url}/me/tickets"
    assert sorted({*result["files"], ".gitattributes"}) == sorted(repo.files)
    assert any(name.startswith(weights) or name.endswith(".gguf") for name in repo.files)
    assert (TOOL_TEMPLATE in repo.files) == (form != "gguf")
    card = repo.files["README.md"].decode()
    assert f"library_name: {relation}" in card
    assert "| Validation loss | 2.500 before training, 1.250 best (step 4), 1.500 last |" in card
    assert "| Energy of the GPU | 0.42 kWh |" in card
    # No path of this machine, in the card or beside it.
    base = str(Path(run.recipe().model.id).parent).encode()
    assert not any(base in content for content in repo.files.values())
    assert _uploads() == []


def test_neither_paths_nor_the_note_are_uploaded(
    tiny_source: ChatSource, hub: FakeHub, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_source.recipe.model.id, tmp_path / "base")
    for name, keys in (
        ("config.json", {"_name_or_path": "/home/me/base"}),
        ("tokenizer_config.json", {"name_or_path": "/home/me/base", "tokenizer_file": "/home/me/t.json"}),
    ):
        config = json.loads((base / name).read_bytes())
        (base / name).write_text(json.dumps({**config, **keys}))
    recipe = replace(tiny_source.recipe, note="for our eyes", model=Model(id=str(base)))
    run = create_run(recipe)
    shutil.copytree(tiny_source.adapters["adapter"], run.adapter_dir)
    assert _export(run, "--form", "merged") == 0
    files = hub.repos["me/tickets"].files
    assert json.loads(files["config.json"])["model_type"] == "llama"
    assert not [name for name, content in files.items() if b"/home/me" in content]
    assert b"our eyes" not in files["README.md"]


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (("--form", "gguf", "--quant", "Q9"), "Unknown file type"),
        (("--quant", "Q4_K_M"), "--quant and --form do not go together"),
        (("--form", "gguf"), "This model cannot be exported as GGUF"),
    ],
)
def test_what_cannot_be_written_creates_no_repository(
    arguments: tuple[str, ...],
    title: str,
    hub: FakeHub,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qlora_tui.gguf_format.conventions.CONVENTIONS", ())
    assert _export(run, *arguments) != 0
    assert title in capsys.readouterr().err
    assert not hub.requests


def test_a_file_that_was_not_compared_says_so(
    hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export(run, "--form", "gguf") == 0
    assert "Not checked: No data" in capsys.readouterr().out
    card = hub.repos["me/tickets"].files["README.md"].decode()
    assert "The file was not compared with the trained model." in card


def test_an_existing_private_repository_stays_private(
    hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/tickets"] = FakeRepo({}, private=True)
    assert _export(run, "--public") == 0
    output = capsys.readouterr().out
    assert "the repository is private." in output
    assert "--public does not change an existing repository" in output


def test_the_same_upload_is_refused_while_it_runs(
    hub: FakeHub, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []

    def measure(*args: object, **settings: object) -> Effect:
        codes.append(_export(run))
        raise UserError("No data", what="There is none.")

    monkeypatch.setattr("qlora_tui.export.hub.measure_effect", measure)
    assert _export(run) == 0
    assert codes == [1]
    assert "Another export writes there" in capsys.readouterr().err


def test_the_card_of_a_checkpoint_names_its_step(hub: FakeHub, run: RunDir) -> None:
    folder = shutil.copytree(run.adapter_dir, run.checkpoints_dir / "step-4")
    (folder / "complete").touch()
    assert _export(run, "--checkpoint", "4") == 0
    assert "| Checkpoint | step 4 |" in hub.repos["me/tickets"].files["README.md"].decode()


def test_a_broken_connection_is_retried(hub: FakeHub, run: RunDir) -> None:
    hub.upload_drops = [100]
    assert _export(run) == 0
    assert hub.sent("PUT", "/") == 2
    assert "adapter_model.safetensors" in hub.repos["me/tickets"].files


def test_an_interrupted_upload_continues(
    hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.statuses["/commit/"] = 502
    assert _export(run, "--form", "merged") == 1
    assert "Hub server error" in capsys.readouterr().err
    assert list(hub.repos["me/tickets"].files) == [".gitattributes"]
    assert _uploads() == []
    sent = hub.sent("PUT", "/")
    del hub.statuses["/commit/"]
    assert _export(run, "--form", "merged") == 0
    assert hub.sent("PUT", "/") == sent == 1
    assert "model.safetensors" in hub.repos["me/tickets"].files


def test_the_same_repository_takes_a_later_upload(hub: FakeHub, run: RunDir) -> None:
    assert _export(run) == 0
    assert _export(run) == 0
    assert len(hub.repos["me/tickets"].files) > 2


@pytest.mark.parametrize(
    ("path", "status", "title"),
    [
        ("/repos/create", 401, "Hugging Face token rejected"),
        ("/repos/create", 403, "No permission to write to the repository"),
        ("/repos/create", 500, "Hub server error"),
        ("/repos/create", 429, "Rate limited by the Hub"),
        ("/preupload/", 403, "No permission to write to the repository"),
        ("/commit/", 409, "The repository is being changed by another upload"),
        ("/commit/", 413, "Too large for the Hub"),
        ("/objects/batch", 413, "Too large for the Hub"),
    ],
)
def test_a_refusal_by_the_hub_is_explained(
    path: str, status: int, title: str, hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.statuses[path] = status
    assert _export(run) == 1
    error = capsys.readouterr().err
    assert title in error
    assert "Traceback" not in error
    assert "signature" not in error


def test_a_creation_that_stays_busy_ends(
    hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_tui.export.hub._CREATION_S", 3.0)
    hub.statuses["/repos/create"] = 409
    hub.error_body = BUSY
    assert _export(run) == 1
    assert "The repository could not be created" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repo", "title"),
    [
        (FakeRepo({"model.bin": b"x"}, private=True), "The repository holds something else"),
        (FakeRepo({}, private=False), "The repository is public"),
        (
            FakeRepo({"README.md": b"---\n- qlora-tui\n---\n", "x.gguf": b"x"}, private=True),
            "The repository holds other files",
        ),
    ],
    ids=["foreign", "public", "another form"],
)
def test_a_repository_with_other_content_is_left_alone(
    repo: FakeRepo, title: str, hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/tickets"] = repo
    before = dict(repo.files)
    assert _export(run) == 1
    assert title in capsys.readouterr().err
    assert repo.files == before
    assert _uploads() == [], "nothing is computed"


def test_a_missing_token_is_said_before_any_work(
    hub: FakeHub, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert _export(run) == 1
    assert "No Hugging Face token" in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.parametrize(
    ("variable", "value", "title"),
    [
        ("HF_ENDPOINT", "http://127.0.0.1:1", "Cannot reach the Hub"),
        ("HF_HUB_OFFLINE", "1", "Hub access is turned off"),
    ],
)
def test_no_network_is_said(
    variable: str,
    value: str,
    title: str,
    hub: FakeHub,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert _export(run) == 1
    assert title in capsys.readouterr().err


@pytest.mark.parametrize("path", ["", "/commit/", "/objects/batch"])
def test_the_token_is_written_nowhere(
    path: str, hub: FakeHub, run: RunDir, private_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if path:
        hub.statuses[path] = 403
    assert _export(run, "--json") == int(bool(path))
    output = capfd.readouterr()
    assert hub.token not in output.out + output.err
    assert "signature=secret" not in output.out + output.err
    files = [Path(folder) / name for folder, _, names in os.walk(private_home) for name in names]
    assert files
    assert not any(hub.token.encode() in file.read_bytes() for file in files)
    assert not any(hub.token.encode() in content for r in hub.repos.values() for content in r.files.values())
    assert any(request.token == hub.token for request in hub.requests)
    # The store is another server.
    assert not any(r.token for r in hub.requests if r.method == "PUT")
