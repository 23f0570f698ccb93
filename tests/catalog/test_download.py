"""Downloading with the real client: which files, how it resumes, and what stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from qlora_tui.catalog import download
from qlora_tui.catalog.download import DownloadPlan, HubFile, start_download
from qlora_tui.catalog.local_models import hub_cache_dir, list_local_models, resolve_model
from qlora_tui.errors import UserError
from qlora_tui.worker import Failure, Message, Progress, Result, decode_message, error_file, start_detached
from tests.catalog.configs import config
from tests.catalog.conftest import Ask, child_environ, tiny_repo
from tests.catalog.fake_hub import FakeHub, FakeRepo, git_hash, sha256
from tests.catalog.models import TINY, safetensors_bytes
from tests.support.polling import wait_for
from tests.support.power import Disk

pytestmark = pytest.mark.slow

DOWNLOAD = 'download.download("org/tiny", retry_delays_s=(0.01, 0.01))'
FETCHED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "model.safetensors",
}
MIB = 1 << 20
ROOT = Path(__file__).parents[2]


def _start(hub: FakeHub) -> subprocess.Popen[bytes]:
    return start_detached(
        "qlora_tui.catalog.download:download",
        "org/tiny",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        environ=child_environ(hub),
    )


def _messages(hub: FakeHub) -> list[Message]:
    out, err = _start(hub).communicate(timeout=60)
    assert b"Traceback" not in err
    return [message for line in out.splitlines() if (message := decode_message(line))]


def _wait_for_half(weights: bytes) -> int:
    """Wait until half of ``weights`` is on the disk; return how much exactly. The store stalls there."""
    partial = hub_cache_dir() / "models--org--tiny" / "blobs" / f"{sha256(weights)}.incomplete"
    half = len(weights) // 2
    wait_for(lambda: partial.exists() and partial.stat().st_size == half)
    return half


def test_weights_config_and_tokenizer_are_fetched_and_nothing_that_runs(hub: FakeHub, ask: Ask) -> None:
    path = Path(ask(DOWNLOAD))
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.relative_to(path).as_posix() for file in files} == FETCHED
    assert (path / "model.safetensors").read_bytes() == hub.repos["org/tiny"].files["model.safetensors"]
    assert resolve_model("org/tiny").folder == path
    requested = [request.path for request in hub.requests]
    assert not any(part in path for path in requested for part in (".bin", ".py", ".pth", "onnx"))


def test_shards_are_those_the_index_names(hub: FakeHub, ask: Ask) -> None:
    files = hub.repos["org/tiny"].files
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files |= {name: safetensors_bytes(100 + i) for i, name in enumerate(names)}
    files["consolidated.safetensors"] = files.pop("model.safetensors")
    files["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {"a": names[0], "b": names[1]}}
    ).encode()
    path = Path(ask(DOWNLOAD))
    assert {file.name for file in path.glob("*.safetensors")} == set(names)
    assert resolve_model("org/tiny").folder == path


def test_the_cache_is_as_the_library_itself_would_leave_it(hub: FakeHub, ask: Ask, tmp_path: Path) -> None:
    ask(DOWNLOAD)
    script = (
        "from huggingface_hub import snapshot_download, scan_cache_dir;"
        f"print(snapshot_download('org/tiny', allow_patterns={sorted(FETCHED)!r}));"
        "info = scan_cache_dir(); print(len(info.warnings), [r.repo_id for r in info.repos])"
    )
    theirs = tmp_path / "theirs"
    for changes in ({"HF_HOME": str(theirs)}, {"HF_HUB_OFFLINE": "1"}):
        environ = child_environ(hub, HF_HUB_DISABLE_XET="1", **changes)
        done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1] == "0 ['org/tiny']"
    ours, downloaded = hub_cache_dir() / "models--org--tiny", theirs / "hub" / "models--org--tiny"
    for part in ("blobs", "refs", "snapshots/" + hub.repos["org/tiny"].commit):
        assert {file.name for file in (ours / part).iterdir()} == {
            file.name for file in (downloaded / part).iterdir()
        }
    assert (ours / "refs" / "main").read_text() == (downloaded / "refs" / "main").read_text()
    for link in (path for path in (ours / "snapshots").rglob("*") if not path.is_dir()):
        assert link.is_symlink()
        assert link.readlink() == (downloaded / link.relative_to(ours)).readlink()


def test_a_second_download_fetches_no_weights(hub: FakeHub, ask: Ask) -> None:
    first = ask(DOWNLOAD)
    hub.requests.clear()
    assert ask(DOWNLOAD) == first
    assert all("model.safetensors" not in request.path for request in hub.requests)
    assert not any(hub.store_url in request.path for request in hub.requests)


def test_a_changed_model_becomes_a_second_snapshot(hub: FakeHub, ask: Ask) -> None:
    first = ask(DOWNLOAD)
    hub.repos["org/tiny"].files["config.json"] = json.dumps({**TINY, "vocab_size": 65}).encode()
    second = ask(DOWNLOAD)
    assert first != second
    assert resolve_model("org/tiny").architecture.vocab_size == 65


def test_a_connection_that_drops_is_taken_up_where_it_broke(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/tiny"] = tiny_repo(5 * MIB)
    hub.drops = [3 * MIB, MIB]
    path = Path(ask(DOWNLOAD))
    weights = hub.repos["org/tiny"].files["model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == weights
    assert hub.ranges(sha256(weights)) == ["bytes=0-", f"bytes={3 * MIB}-", f"bytes={4 * MIB}-"]


def test_an_abandoned_download_resumes_next_time(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/tiny"] = tiny_repo(5 * MIB)
    hub.drops = [2 * MIB, 0, 0, 0, 0]
    problem = ask(DOWNLOAD)
    assert problem["title"] == "Cannot reach the Hub"
    (model,) = list_local_models()
    assert model.refusal is not None
    assert "Incomplete download" in model.refusal.title
    with pytest.raises(UserError, match="only partly in the cache"):
        resolve_model("org/tiny")
    hub.drops = []
    hub.requests.clear()
    path = Path(ask(DOWNLOAD))
    weights = hub.repos["org/tiny"].files["model.safetensors"]
    assert (path / "model.safetensors").read_bytes() == weights
    assert hub.ranges(sha256(weights)) == [f"bytes={2 * MIB}-"]
    assert resolve_model("org/tiny").folder == path


def test_a_killed_download_goes_on_the_next_time(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = tiny_repo(6 * MIB)
    weights = hub.repos["org/tiny"].files["model.safetensors"]
    hub.stalls = threading.Event()
    child = _start(hub)
    have = _wait_for_half(weights)
    child.kill()
    child.communicate()
    hub.stalls.set()
    hub.requests.clear()
    *_, result = _messages(hub)
    assert isinstance(result, Result)
    assert hub.ranges(sha256(weights)) == [f"bytes={have}-"]
    assert (result.decode(Path) / "model.safetensors").read_bytes() == weights


def test_a_store_without_ranges_starts_over_and_gets_it_right(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/tiny"] = tiny_repo(3 * MIB)
    hub.drops, hub.ignores_ranges = [2 * MIB], True
    path = Path(ask(DOWNLOAD))
    assert (path / "model.safetensors").read_bytes() == hub.repos["org/tiny"].files["model.safetensors"]


def test_damaged_weights_are_not_kept(hub: FakeHub, ask: Ask) -> None:
    hub.damaged = True
    assert ask(DOWNLOAD)["title"] == "The download is damaged"
    hub.damaged = False
    path = Path(ask(DOWNLOAD))
    assert (path / "model.safetensors").read_bytes() == hub.repos["org/tiny"].files["model.safetensors"]


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("repeats", [1, 2, 100])
def test_a_body_longer_than_its_file_is_rejected(repeats: int, hub: FakeHub, ask: Ask) -> None:
    content = hub.repos["org/tiny"].files["tokenizer.json"]
    hub.bodies["/tokenizer.json"] = content * repeats + b" "
    assert ask(DOWNLOAD)["title"] == "The download is damaged"
    assert len(hub.ranges("/tokenizer.json")) == 1


def test_a_body_without_end_is_cut_off(hub: FakeHub, ask: Ask) -> None:
    hub.endless = "/tokenizer.json"
    assert ask(DOWNLOAD)["title"] == "The download is damaged"
    assert hub.sent_bytes < 64 * MIB
    assert len(hub.ranges("/tokenizer.json")) == 1


@pytest.mark.parametrize("body", [b"", b"short"])
def test_a_body_that_stays_short_is_given_up(body: bytes, hub: FakeHub, ask: Ask) -> None:
    hub.bodies["/tokenizer.json"] = body
    assert ask(DOWNLOAD)["title"] == "Cannot reach the Hub"
    assert len(hub.ranges("/tokenizer.json")) <= 4


def test_a_range_that_is_never_satisfied_is_given_up(hub: FakeHub, ask: Ask) -> None:
    hub.statuses["/tokenizer.json"] = 416
    assert ask(DOWNLOAD)["title"] == "Cannot reach the Hub"
    assert len(hub.ranges("/tokenizer.json")) <= 4


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: b"short", flipped])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_downloaded_again(
    name: str, damage: Callable[[bytes], bytes], hub: FakeHub, ask: Ask
) -> None:
    path = Path(ask(DOWNLOAD))
    whole = hub.repos["org/tiny"].files[name]
    (path / name).resolve().write_bytes(damage(whole))
    assert ask(DOWNLOAD) == str(path)
    assert (path / name).read_bytes() == whole


def test_the_users_own_version_of_a_file_stays(hub: FakeHub, ask: Ask) -> None:
    path = Path(ask(DOWNLOAD))
    (path / "config.json").unlink()
    (path / "config.json").write_text("mine")
    assert ask(DOWNLOAD) == str(path)
    assert (path / "config.json").read_bytes() == hub.repos["org/tiny"].files["config.json"]
    assert (path / "config.json.replaced").read_text() == "mine"


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"0123456789" * 1000
    file = HubFile("config.json", len(content), git_hash(content))
    root = tmp_path / "root"
    plan = DownloadPlan("org/tiny", "a" * 40, (file,), root)
    (root / "blobs").mkdir(parents=True)

    def append(plan: object, file: object, partial: IO[bytes], on_bytes: object) -> None:
        partial.write(content)

    disk = Disk(root)
    with monkeypatch.context() as watched:
        watched.setattr(download, "_append", append)
        watched.setattr(download, "network_error", lambda: ConnectionError)
        disk.watch(watched)
        download._fetch(plan, file, lambda *args: None, ())
    for _ in disk.cuts(tmp_path / "after"):
        blob = tmp_path / "after" / "blobs" / file.etag
        assert not blob.exists() or blob.read_bytes() == content
    assert blob.exists()
    disk.close()


def test_the_token_is_sent_to_the_hub_only(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/tiny"].gated = True
    hub.granted.add("org/tiny")
    ask(DOWNLOAD, HF_TOKEN=hub.token)
    store = [request for request in hub.requests if "signature" in request.path]
    assert [request.token for request in store] == [None]
    assert all(request.token == hub.token for request in hub.requests if request not in store)


def test_progress_reaches_all_bytes(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = tiny_repo(4 * MIB)
    *progress, result = _messages(hub)
    assert isinstance(result, Result)
    done = [message.done for message in progress if isinstance(message, Progress)]
    total = sum(len(hub.repos["org/tiny"].files[name]) for name in FETCHED)
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)


def test_a_spawned_download_goes_on_when_nobody_reads_its_output(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.repos["org/tiny"] = tiny_repo(4 * MIB)
    hub.stalls = threading.Event()
    child = start_download("org/tiny", error_file())
    assert os.getsid(child.pid) == child.pid
    assert child.stdout is not None
    assert isinstance(decode_message(child.stdout.readline()), Progress)
    child.stdout.close()
    hub.stalls.set()
    assert child.wait(60) == 0
    assert resolve_model("org/tiny")


def test_two_downloads_of_one_model_do_not_mix(hub: FakeHub) -> None:
    hub.repos["org/tiny"] = tiny_repo(4 * MIB)
    hub.stalls = threading.Event()
    first = _start(hub)
    _wait_for_half(hub.repos["org/tiny"].files["model.safetensors"])
    *_, failure = _messages(hub)
    assert isinstance(failure, Failure) and failure.title == "The model is already being downloaded"
    hub.stalls.set()
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert resolve_model("org/tiny")


def _refused(hub: FakeHub, repo: FakeRepo) -> Failure:
    hub.repos["org/tiny"] = repo
    (failure,) = _messages(hub)
    assert isinstance(failure, Failure)
    assert not hub_cache_dir().exists()
    return failure


def test_a_model_of_pickles_is_refused_before_anything_is_fetched(hub: FakeHub) -> None:
    repo = tiny_repo()
    del repo.files["model.safetensors"]
    assert _refused(hub, repo).title == "Only pickled weights"


def test_a_model_needing_its_own_code_is_never_downloaded(hub: FakeHub) -> None:
    repo = tiny_repo()
    repo.files["config.json"] = json.dumps(config("internlm/internlm2_5-7b")).encode()
    assert _refused(hub, repo).title == "This model needs its own code"


def test_a_gated_model_is_refused_with_guidance(hub: FakeHub) -> None:
    refused = _refused(hub, tiny_repo(gated=True))
    assert refused.title == "The model is gated"
    assert f"{hub.url}/org/tiny" in refused.fix


def test_a_full_disk_is_told_before_anything_is_fetched(hub: FakeHub, ask: Ask) -> None:
    hub_cache_dir().mkdir(parents=True)
    problem = ask(
        "(setattr(download.shutil, 'disk_usage', lambda path: download.shutil._ntuple_diskusage(1, 1, 1000)),"
        f"{DOWNLOAD})"
    )
    assert problem["title"] == "Not enough disk space"
    assert str(hub_cache_dir()) in problem["what"]
    assert list(hub_cache_dir().iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_loses_nothing(hub: FakeHub, ask: Ask) -> None:
    weights = hub.repos["org/tiny"].files["model.safetensors"]
    blobs = hub_cache_dir() / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(weights)}.incomplete").symlink_to("/dev/full")
    assert ask(DOWNLOAD)["title"] == "The disk is full"
    assert (blobs / git_hash(hub.repos["org/tiny"].files["config.json"])).is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_told(hub: FakeHub, ask: Ask) -> None:
    hub_cache_dir().mkdir(parents=True)
    hub_cache_dir().chmod(0o500)
    assert ask(DOWNLOAD)["title"] == "Cannot write the model"


def test_a_cache_that_is_a_file_is_told(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert ask(DOWNLOAD, HF_HUB_CACHE=str(tmp_path / "file"))["title"] == "Cannot write the model"


def test_a_page_with_odd_hashes_is_not_a_hub(hub: FakeHub, ask: Ask) -> None:
    problem = ask(
        "hub_files._parse_listing({'sha': 'a' * 40, 'siblings':"
        " [{'rfilename': 'config.json', 'size': 1, 'blobId': '../../x'}]})"
    )
    assert problem["title"] == "The response is not from a model Hub"
