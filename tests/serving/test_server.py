"""The process of a server: where it listens, what it prints, and how it is found and stopped."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from uvicorn.server import ServerState

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.errors import UsageError, UserError
from qlora_tui.locks import locked
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.runs import servers
from qlora_tui.runs.devices import CPU, Devices, RunDevice, claimed, record_devices, run_on
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import ExportRequest, ExportStatus, exports_dir, write_export_status
from qlora_tui.serving import server as serving_server
from qlora_tui.serving.model_names import RunsToServe, served_models
from qlora_tui.serving.server import Server, TimedConnection, is_loopback
from tests.cli.conftest import Call, call
from tests.serving.conftest import serving, write_run
from tests.support.polling import wait_for
from tests.support.quick_starts import TRAINING_MODULES
from tests.support.trainer_processes import Trainers

__all__ = ["call"]

BASE = ChatSource(recipe=Recipe(model=Model(id="/models/tiny")))


@pytest.fixture
def runs(private_home: Path, tmp_path: Path) -> list[RunDir]:
    """Two runs of one base, and one of another."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    source = ChatSource(recipe=BASE.recipe, adapters={"adapter": str(adapter)})
    other = ChatSource(recipe=Recipe(model=Model(id="/models/other")), adapters=source.adapters)
    state = private_home / "state"
    return [
        write_run(state, "a-1.0", source, {"adapter": "adapter", "step-2": "adapter", "step-4": "adapter"}),
        write_run(state, "b", source, {"step-7": "adapter"}),
        write_run(state, "c", other, {"adapter": "adapter"}),
    ]


def test_names_lead_to_adapters(runs: list[RunDir]) -> None:
    runs[0].name_path.write_text("My run")
    models = served_models(RunsToServe(runs[:2]), {"gpt": "My run:4"})
    assert [model.name for model in models.listed] == ["base", "a-1.0", "a-1.0:4", "a-1.0:2", "b:7", "gpt"]

    def folder(name: str) -> str:
        model = models.find(name)
        assert model is not None
        return models.source.adapters.get(model.adapter_name, "")

    assert folder("/models/tiny") == folder("base") == ""
    assert folder("My run") == folder("a-1.0") == str(runs[0].adapter_dir)
    assert folder("gpt") == str(runs[0].checkpoints_dir / "step-4")
    # Without a final adapter a run's name means its newest checkpoint.
    assert folder("b") == folder("last") == folder("b:7") == str(runs[1].checkpoints_dir / "step-7")
    assert models.find("c") is None
    # peft makes attributes of them.
    assert not any("." in name for name in models.source.adapters)


def test_a_name_of_two_runs_means_none_and_no_name_hides_another(runs: list[RunDir]) -> None:
    def found(name: str) -> str:
        model = served_models(RunsToServe(runs[:2])).find(name)
        return model.name if model is not None else ""

    runs[1].name_path.write_text("mine")
    assert (found("mine"), found("mine:7")) == ("b:7", "b:7")
    runs[0].name_path.write_text("mine")
    assert (found("mine"), found("mine:7"), found("mine:4")) == ("", "", "")
    assert (found("a-1.0"), found("b")) == ("a-1.0", "b:7")
    newest = found("last")
    for name in ("last", "base", "/models/tiny", runs[1].id):
        runs[0].name_path.write_text(name)
        assert (found("last"), found("base"), found("/models/tiny"), found("b")) == (
            newest,
            "base",
            "base",
            "b:7",
        )
        assert not found("b:4")


def test_runs_of_two_bases_are_refused_with_what_to_do(runs: list[RunDir]) -> None:
    with pytest.raises(UsageError) as refused:
        RunsToServe([runs[0], runs[2]])
    assert "c was trained on" in str(refused.value) or "/models/other" in str(refused.value)
    assert "qlora-tui serve c --port" in refused.value.fix
    # Without names: all that share the base of the newest.
    assert {run.id for run in RunsToServe().now()} in ({"a-1.0", "b"}, {"c"})
    assert [run.id for run in RunsToServe([runs[1]], with_others=True).now()] == ["b", "a-1.0"]


@pytest.mark.parametrize(
    ("alias", "name", "words"),
    [
        ("gpt", "c", "gpt refers to c"),
        ("base", "a-1.0", "base is already"),
        ("last", "base", "last is already"),
    ],
)
def test_an_alias_that_cannot_work_is_refused_at_the_start(
    runs: list[RunDir], alias: str, name: str, words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        Server(RunsToServe(runs[:1]), port=0, aliases={alias: name})
    assert words in refused.value.what


def test_a_second_server_on_a_port_is_refused_by_name(runs: list[RunDir]) -> None:
    first = Server(RunsToServe(runs[:1]), port=0)
    with pytest.raises(UsageError) as refused:
        Server(RunsToServe(runs[:1]), port=first.port)
    first.close()
    assert "/models/tiny" in refused.value.what
    assert f"--stop --port {first.port}" in refused.value.fix


class Started:
    """A process that has started a server, or has ended with an error."""

    def __init__(self, output: Any, ends: bool) -> None:
        self.pid = 0 if ends else os.getpid()
        self._code = 2 if ends else None
        output.write(b"qlora-tui: Broken: badly." if ends else b"It runs.")

    def poll(self) -> int | None:
        return self._code


def test_a_server_in_the_background_keeps_its_log(
    runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(RunsToServe(runs[:1]), port=0)
    for ends in (False, True):
        monkeypatch.setattr(
            servers, "spawn_detached", lambda *argv, output, environ, ends=ends: Started(output, ends)
        )
        if not ends:
            assert servers.start_in_background([]).port == server.port
            continue
        with pytest.raises(UserError) as failed:
            servers.start_in_background([])
        assert (failed.value.title, failed.value.what) == ("Broken", "badly.")
        assert Path(failed.value.fix.split()[-1].rstrip(".")).is_file()
    assert (servers.servers_dir() / f"{server.port}.log").read_text() == "It runs."
    server.close()


def test_other_machines_need_a_key_that_is_printed_nowhere(
    runs: list[RunDir], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Server] = []
    monkeypatch.setattr(Server, "run", lambda server, on_change: started.append(server))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    said = call("serve", "a-1.0", "--host", "0.0.0.0", "--port", "0")
    (server,) = started
    key_file = Path(server.status.key_file)
    assert said.code == 0
    assert key_file.read_text() == server.api_key
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert len(server.api_key) > 30
    assert server.api_key not in said.out + said.err + str(server.status)
    assert f"$(cat {key_file})" in said.out
    assert f"http://{os.uname().nodename}:{server.port}/v1" in said.out
    server.close()
    assert not key_file.exists()


def test_a_local_server_needs_no_key_and_says_how_a_laptop_reaches_it(
    runs: list[RunDir], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "run", lambda server, on_change: server.close())
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.9 50000 192.0.2.1 22")
    said = call("serve", "a-1.0", "b", "--port", "0")
    assert "Authorization" not in said.out
    assert "@192.0.2.1," in said.out and "ssh -N -L" in said.out
    # The port is forwarded to the address that the server has.
    port, target = call("serve", "a-1.0", "--host", "::1", "--port", "0").out.split(" -L ")[1].split(":", 1)
    assert target.startswith(f"[::1]:{port} ")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False)],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_the_commands_of_other_servers_name_the_run(runs: list[RunDir], call: Call) -> None:
    commands = call("serve", "a-1.0", "--print-commands", "--json").json["commands"]
    assert commands == [
        "qlora-tui export merge a-1.0 MERGED",
        "vllm serve MERGED --served-model-name a-1.0 --host 127.0.0.1 --port 8000",
        "qlora-tui export gguf a-1.0 MODEL.gguf --quant Q4_K_M",
        "llama-server -m MODEL.gguf --alias a-1.0 --host 127.0.0.1 --port 8000",
    ]


def test_the_commands_of_other_servers_have_the_newest_files_that_exist(
    runs: list[RunDir], call: Call, tmp_path: Path
) -> None:
    for number, (name, checkpoint) in enumerate((("old", None), ("new", None), ("step", 2), ("gone", None))):
        file, folder = tmp_path / f"{name}.gguf", exports_dir(runs[0]) / f"{number}"
        if name != "gone":
            file.touch()
        folder.mkdir(parents=True)
        request = ExportRequest(form="gguf", out=str(file), checkpoint=checkpoint)
        (folder / "request.json").write_bytes(msgspec.json.encode(request))
        write_export_status(folder, ExportStatus(state="finished", at=number, paths=(str(file),)))
    commands = call("serve", "a-1.0", "--print-commands", "--json").json["commands"]
    new = tmp_path / "new.gguf"
    assert commands[2:] == [f"llama-server -m {new} --alias a-1.0 --host 127.0.0.1 --port 8000"]


def test_stop_ends_the_only_server_and_asks_which_of_several(
    runs: list[RunDir], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: str) -> str:
        said = call("serve", "--stop", *arguments)
        assert said.code == 2
        return said.err

    stopped: list[int] = []
    monkeypatch.setattr("qlora_tui.cli.serve.stop_server", lambda server: stopped.append(server.port))
    assert "`qlora-tui serve`" in asked()
    first, second = (Server(RunsToServe([run]), port=0) for run in runs[:2])
    assert f"--port {first.port}: base, a-1.0" in asked() and f"--port {second.port}: base, b" in asked()
    assert f"--port {first.port}" in asked("--port", "1")
    assert call("serve", "--stop", f"--port={second.port}").code == 0
    first.close()
    assert call("serve", "--stop").code == 0
    assert stopped == [second.port] * 2
    second.close()


def test_only_a_run_on_its_device_takes_the_model(runs: list[RunDir]) -> None:
    gpu = RunDevice("GPU-1", 1, "RTX 4090")
    record_devices(runs[0], Devices((gpu,)))
    with locked(runs[0].trainer_lock_path):
        assert run_on("GPU-1") == "a-1.0"
        assert run_on("GPU-0") == run_on(CPU) == ""
        runs[0].devices_path.unlink()
        assert run_on("GPU-0") == "a-1.0"  # its file is lost
    with claimed(Devices((gpu,))):  # its trainer does not run yet
        assert run_on("GPU-1") and not run_on(CPU)
    assert not run_on("GPU-1")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1",
    ],
)
async def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_server, "REQUEST_S", 0.05)
    config = uvicorn.Config(PlainTextResponse("answered"), lifespan="off", timeout_keep_alive=100)
    state, loop = ServerState(), asyncio.get_running_loop()
    async with await loop.create_server(
        lambda: TimedConnection(config, state, {}), "127.0.0.1", 0
    ) as listening:
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        writer.write(sent)
        answered = await asyncio.wait_for(reader.read(), 20)
        assert answered.count(b"answered") == (b"\r\n\r\n" in sent)
        writer.close()
    assert not state.connections


@pytest.mark.slow
def test_an_idle_model_is_unloaded_and_comes_back(
    trainers: Trainers, tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
    write_run(tmp_path, "a", tiny_source, {"adapter": "adapter"})
    with serving(tmp_path, "a", "--idle-unload", "0.001") as server:
        server.wait_for("unloaded")
        wait_for(lambda: server.state["engine_pid"] == 0)
        asked = {"model": "a", "prompt": "the quick", "max_tokens": 2}
        assert server.post("/completions", **asked).status_code == 200


@pytest.mark.slow
def test_what_is_trained_saved_or_deleted_later_needs_no_restart(
    trainers: Trainers, tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
    first = write_run(tmp_path, "a", tiny_source, {"adapter": "adapter"})
    with serving(tmp_path, "--alias", "gpt=a") as server:
        server.wait_for("ready")
        engine = server.state["engine_pid"]

        def texts(*names: str) -> list[str]:
            answers = [
                server.post("/completions", model=name, prompt="the quick", temperature=0, max_tokens=8)
                for name in names
            ]
            return [each.json()["choices"][0]["text"] if each.is_success else "" for each in answers]

        base, other, same, absent = texts("base", "a", "gpt", "b")
        assert base != other == same and not absent
        write_run(tmp_path, "b", tiny_source, {"step-5": "adapter"})
        assert texts("b", "b:5", "b:6") == [other, other, ""]
        write_run(tmp_path, "c", tiny_source, {"adapter": "step-2"})
        with server.client() as client:
            assert {each["id"] for each in client.get("/models").json()["data"]} == {
                "base",
                "a",
                "b:5",
                "c",
                "gpt",
            }
        assert texts("last") == texts("c") != [other]
        shutil.rmtree(RunDir(server.state_dir / "runs" / "c").adapter_dir)
        shutil.copytree(tiny_source.adapters["adapter"], RunDir(server.state_dir / "runs" / "c").adapter_dir)
        assert texts("c") == [other]
        first.path.rename(tmp_path / "deleted")
        assert texts("a", "gpt", "b", "base") == ["", "", other, base]
        assert server.state["engine_pid"] == engine


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_a_503_in_words(
    trainers: Trainers, tiny_source: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers.server.serve(TRAINING_MODULES, monkeypatch)
    recipe = replace_setting(tiny_source.recipe, "model.id", str(tmp_path / "gone"))
    source = ChatSource(recipe=recipe, adapters=tiny_source.adapters)
    write_run(tmp_path, "a", source, {"adapter": "adapter"})
    with serving(tmp_path, "a") as server:
        server.wait_for("failed")
        response = server.post("/completions", model="a", prompt="the quick")
        assert response.status_code == 503
        assert "gone" in response.json()["error"]["message"]
