"""Searching the hub and asking about one model, with the real client against a hub on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from threading import Event
from typing import Any

import pytest

from qlora_tui.catalog import hub as hub_responses
from tests.catalog.configs import config
from tests.catalog.conftest import Ask, tiny_repo
from tests.catalog.fake_hub import FakeHub
from tests.catalog.models import TINY

pytestmark = pytest.mark.slow

SEARCH = '[(m.id, m.downloads, m.gated, m.license, m.model_type) for m in hub.search_models("tiny")]'


def test_a_search_finds_the_most_downloaded_first(hub: FakeHub, ask: Ask) -> None:
    hub.repos["other/TINY-gated"] = tiny_repo(downloads=99, gated=True, tags=("transformers", "safetensors"))
    hub.repos["other/large"] = tiny_repo()
    hub.repos["other/tiny-gguf"] = tiny_repo(tags=("gguf",))
    assert ask(SEARCH) == [
        ["other/TINY-gated", 99, True, None, "llama"],
        ["org/tiny", 10, False, "apache-2.0", "llama"],
    ]


def test_a_search_sends_one_request(hub: FakeHub, ask: Ask) -> None:
    # With telemetry on, huggingface_hub fetches a list of coding agents of any length first.
    hub.endless = "/api/agent-harnesses"
    assert ask(SEARCH, HF_HUB_DISABLE_TELEMETRY="")
    assert [request.path.partition("?")[0] for request in hub.requests] == ["/api/models"]


def test_a_search_may_find_nothing(ask: Ask) -> None:
    assert ask('hub.search_models("no such thing")') == []


def test_a_search_says_what_cannot_be_trained(hub: FakeHub, ask: Ask) -> None:
    for name, changes in {
        "code": config("internlm/internlm2_5-7b"),
        "awq": {**TINY, "quantization_config": {"quant_method": "awq"}},
        "bert": {"model_type": "bert"},
        "empty": {},
    }.items():
        hub.repos[f"refused/{name}"] = tiny_repo()
        hub.repos[f"refused/{name}"].files["config.json"] = json.dumps(changes).encode()
    results = ask('{m.id: m.refusal and m.refusal.title for m in hub.search_models("refused")}')
    assert results == {
        "refused/code": "This model needs its own code",
        "refused/awq": "This model is already quantized",
        "refused/bert": "This model does not generate text",
        "refused/empty": None,
    }


def test_a_config_is_read_without_touching_the_cache(ask: Ask) -> None:
    expression = (
        'hub.fetch_config("org/tiny")["model_type"], '
        '__import__("qlora_tui.catalog.local_models", fromlist=["x"]).hub_cache_dir().exists()'
    )
    assert ask(expression) == ["llama", False]


CANNOT_BE_HAD = [
    ("org/none", None, "Model not found on the Hub", "hf auth login"),
    ("org/private", None, "Model not found on the Hub", "hf auth login"),
    ("org/gated", None, "The model is gated", "/org/gated, then log in with: hf auth login"),
    ("org/gated", "right", "The model is gated", "/org/gated with that account"),
    ("org/tiny", "hf_expired", "Hugging Face token rejected", "hf auth login"),
    ("org/bare", None, "File missing from the model", "another"),
    ("../../etc", None, "Invalid model name", "Search"),
    ("a" * 200, None, "Invalid model name", "Search"),
]


@pytest.mark.parametrize("token", [None, "right", "hf_expired"])
def test_an_unavailable_model_is_explained_with_a_fix(hub: FakeHub, ask: Ask, token: str | None) -> None:
    hub.repos |= {"org/gated": tiny_repo(gated=True), "org/private": tiny_repo(private=True)}
    hub.repos["org/bare"] = tiny_repo()
    del hub.repos["org/bare"].files["config.json"]
    cases = [case for case in CANNOT_BE_HAD if case[1] == token]
    tokens = {} if token is None else {"HF_TOKEN": hub.token if token == "right" else token}
    problems = ask(f"[trial(hub.fetch_config, model) for model in {[case[0] for case in cases]!r}]", **tokens)
    for (model, _, title, expected), problem in zip(cases, problems, strict=True):
        assert problem["title"] == title, model
        assert expected in problem["fix"]
        assert "hf_expired" not in str(problem)


def test_a_granted_token_opens_a_gated_model(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/gated"] = tiny_repo(gated=True)
    hub.granted.add("org/gated")
    assert ask('hub.fetch_config("org/gated")["model_type"]', HF_TOKEN=hub.token) == "llama"


def test_a_hub_on_a_bad_day_is_told_at_once(hub: FakeHub, ask: Ask) -> None:
    cases = {
        429: ("Rate limited by the Hub", "Wait 7 seconds"),
        403: ("Access denied by the Hub", "read access"),
        500: ("Hub server error", "Try again"),
        503: ("Hub server error", "Try again"),
    }
    hub.statuses = {f"status{status}": status for status in cases}
    problems = ask(f"[trial(hub.search_models, f'status{{status}}') for status in {list(cases)!r}]")
    for (title, expected), problem in zip(cases.values(), problems, strict=True):
        assert problem["title"] == title
        assert expected in problem["fix"]
    assert len(hub.requests) == len(cases)


def test_a_login_page_is_not_taken_for_the_hub(hub: FakeHub, ask: Ask) -> None:
    hub.html = True
    assert ask('hub.search_models("tiny")')["title"] == "The response is not from a model Hub"


def test_json_of_another_shape_is_not_taken_for_the_hub(hub: FakeHub, ask: Ask) -> None:
    hub.repos["org/tiny"].files["config.json"] = b"[1]"
    assert ask('hub.fetch_config("org/tiny")')["title"] == "The response is not from a model Hub"


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "Cannot reach the Hub"),
        ({"HF_ENDPOINT": "http://no-such-host.invalid"}, "Cannot reach the Hub"),
        ({"HF_ENDPOINT": "ftp://somewhere"}, "HF_ENDPOINT is not a web address"),
        ({"HF_HUB_OFFLINE": "1"}, "Hub access is turned off"),
        ({"TRANSFORMERS_OFFLINE": "1"}, "Hub access is turned off"),
    ],
)
def test_no_network_is_told_at_once(ask: Ask, changes: dict[str, str], title: str) -> None:
    problem = ask('hub.search_models("tiny")', **changes)
    assert problem["title"] == title
    assert problem["fix"]


def test_asking_the_hub_loads_no_ml_library(ask: Ask) -> None:
    assert (
        ask(
            '(hub.search_models("tiny"),'
            ' [m for m in ("torch", "transformers", "numpy") if m in sys.modules])[1]',
            FORK_SERVERS="",
        )
        == []
    )


ODD_FIELDS: tuple[dict[str, Any], ...] = (
    {"downloads": "many"}, {"downloads": [1]}, {"downloads": -1}, {"config": ["x"]}, {"tags": 5},
    {"tags": [5]},
    {"safetensors": [1]}, {"safetensors": {"total": "many"}}, {"safetensors": {"total": 10**400}},
    {"lastModified": {}}, {"id": ["a/b"]}, {"gated": []},
)  # fmt: skip


@pytest.mark.parametrize("odd", ODD_FIELDS, ids=str)
def test_a_result_with_odd_fields_hides_no_other(odd: dict[str, Any], hub: FakeHub, ask: Ask) -> None:
    hub.bodies["/api/models?"] = json.dumps([{"id": "a/odd", **odd}, {"id": "a/whole"}]).encode()
    assert ask('[m.id for m in hub.search_models("a")]') == ["a/whole"]


@pytest.mark.parametrize(
    "config", [{"model_type": ["llama"]}, {"model_type": "llama", "architectures": {"x": 1}}]
)
def test_a_result_with_an_odd_config_is_listed(config: dict[str, Any], hub: FakeHub, ask: Ask) -> None:
    hub.bodies["/api/models?"] = json.dumps([{"id": "a/odd", "config": config}]).encode()
    assert ask('[m.id for m in hub.search_models("a")]') == ["a/odd"]


@pytest.mark.parametrize(
    "body",
    [b'[{"id": "a/b", "downloads": 1e999}]', b'{"error": "x"}', b"[" * 100_000, b'["\xff"]', b"[5]", b""],
)
def test_an_answer_that_no_hub_gives_is_said(body: bytes, hub: FakeHub, ask: Ask) -> None:
    hub.bodies["/api/models?"] = body
    assert ask('hub.search_models("a")')["title"] == "The response is not from a model Hub"


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_an_answer_without_end_is_cut_off(status: int, hub: FakeHub, ask: Ask) -> None:
    hub.endless = "/api/models?"
    hub.statuses["/api/models?"] = status
    assert ask('hub.search_models("a")')["title"]
    assert hub.sent_bytes < 1 << 26


@pytest.mark.parametrize(
    "body", [b"[]", b'{"error": ["x"]}', b'{"errors": 5}', b'{"error": "' + b"a" * 10 + b'"']
)
def test_the_body_of_an_error_does_not_matter(body: bytes, hub: FakeHub, ask: Ask) -> None:
    hub.error_body = body
    hub.statuses["/api/models?"] = 500
    assert ask('hub.search_models("a")')["title"] == "Hub server error"


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "abc"}, {"size": -5}, {"size": None}, {"size": 1.5}, {"blobId": 5},
        {"rfilename": ["config.json"]},
        {"lfs": "x"}, {"lfs": {"sha256": "a" * 64, "size": "abc"}}, {"lfs": {"sha256": 5, "size": 5}},
    ],
    ids=str,
)  # fmt: skip
def test_a_listing_with_odd_fields_is_said(changes: dict[str, Any], hub: FakeHub, ask: Ask) -> None:
    sibling = {"rfilename": "config.json", "size": 5, "blobId": "a" * 40, **changes}
    hub.bodies["/revision/"] = json.dumps({"sha": "a" * 40, "siblings": [sibling]}).encode()
    assert ask('hub_files.plan_download("org/tiny")')["title"] == "The response is not from a model Hub"


class DrippingResponse:
    """A body of which a piece arrives every second of a clock."""

    def __init__(self, piece: bytes, clock: list[float]) -> None:
        self._piece, self._clock = piece, clock

    def iter_bytes(self) -> Iterator[bytes]:
        for _ in range(100):
            self._clock[0] += 1.0
            yield self._piece


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(1, 30), (2_000, 100)])
def test_a_body_that_drips_is_given_up(
    piece_bytes: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    read = []
    with nullcontext() if pieces == 100 else pytest.raises(hub_responses.TooSlow):
        read += list(hub_responses.pieces(DrippingResponse(b"a" * piece_bytes, clock)))
    assert clock[0] == pieces


def test_headers_that_drip_are_given_up() -> None:
    with pytest.raises(hub_responses.TooSlow):
        hub_responses._within(0.0, Event().wait)
