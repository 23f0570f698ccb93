"""Whatever a client sends, it is told in words what was wrong, and the server lives."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from qlora_tui.locks import locked
from tests.serving.conftest import FIRST, KEY, SECOND, Served
from tests.support.polling import wait_for

pytestmark = pytest.mark.slow

CHAT = "/chat/completions"
ASK: dict[str, Any] = {
    "model": FIRST,
    "messages": [{"role": "user", "content": "what is red"}],
    "max_tokens": 3,
    "temperature": 0,
}
ENDLESS = {**ASK, "max_tokens": 1500}


@pytest.fixture(autouse=True)
def lives(served: Served) -> Iterator[None]:
    """After each test the server answers."""
    yield
    served.wait_for("ready")
    assert served.post(CHAT, **ASK).status_code == 200


def head_of(body_bytes: int) -> bytes:
    head = f"POST /v1{CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Length: {body_bytes}\r\n\r\n".encode()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"]
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"model": 5, "messages": []}',
        b'{"model": "base", "messages": [{"role": "king", "content": "x"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": 7}]}',
        b'{"model": "base"}',
    ],
)
def test_a_malformed_body_is_a_400(served: Served, body: bytes) -> None:
    with served.client() as client:
        error_of(client.post(CHAT, content=body), 400)


@pytest.mark.parametrize("prompt", [[-1], [10**6], [[1, 2], [2**63]], [[]], [], "", [1, "a"], {}, [True]])
def test_an_impossible_prompt_is_a_400(served: Served, prompt: Any) -> None:
    error_of(served.post("/completions", model="base", prompt=prompt, max_tokens=1, logprobs=1), 400)


def test_a_long_body_is_refused_before_it_is_read(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.status["port"]), timeout=20) as connection:
        connection.sendall(head_of(10_000_001))
        assert b" 413 " in connection.recv(1000)
    with served.client() as client:
        pieces = (b" " * 1_000_000 for _ in range(11))
        error_of(client.post(CHAT, content=pieces), 413)


def test_a_prompt_beyond_the_context_is_refused_in_words(served: Served) -> None:
    long = [{"role": "user", "content": "red blue " * 200_000}]
    assert "tokens" in error_of(served.post(CHAT, **{**ASK, "messages": long}), 400)["message"]


def test_a_wrong_name_is_not_repeated_at_length(served: Served) -> None:
    assert len(error_of(served.post(CHAT, **{**ASK, "model": "x" * 1_000_000}), 404)["message"]) < 300


@pytest.mark.parametrize("path", ["/nothing", "/models/none"])
def test_what_is_not_there_is_a_404(served: Served, path: str) -> None:
    with served.client() as client:
        error_of(client.get(path), 404)


def test_a_get_where_a_post_is_meant_is_a_405(served: Served) -> None:
    with served.client() as client:
        error_of(client.get(CHAT), 405)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000", "Host": "localhost:8000"},
        {"Origin": "null"},
        {"Host": "[::"},
    ],
)
def test_a_web_page_of_another_site_is_refused(served: Served, headers: dict[str, str]) -> None:
    with served.client(**headers) as client:
        error_of(client.get("/models"), 403)


def test_without_a_key_only_health_is_told(served: Served) -> None:
    root = served.url.removesuffix("/v1")
    for path in ("/metrics", "/v1/models", "/anything"):
        error_of(httpx.get(root + path), 401)
    assert httpx.get(f"{root}/health").json() == {"status": "ok", "model": "ready"}
    # RFC 9110, section 11.1: the scheme has no case.
    assert httpx.get(f"{root}/v1/models", headers={"Authorization": f"bearer {KEY}"}).is_success
    error_of(httpx.get(f"{root}/v1/models", headers={"Authorization": f"Basic {KEY}"}), 401)


def test_metrics_count_answers_and_tokens(served: Served) -> None:
    def metrics() -> dict[str, float]:
        with served.client() as client:
            text = client.get(served.url.replace("/v1", "/metrics")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = metrics()
    served.post(CHAT, **ASK)
    after = metrics()
    assert after["qlora_tui_generated_tokens_total"] - before["qlora_tui_generated_tokens_total"] == 3
    assert after['qlora_tui_requests_total{status="200"}'] > before['qlora_tui_requests_total{status="200"}']
    assert after["qlora_tui_answers_in_progress"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answer(served: Served, stream: bool) -> None:
    # Computed to their end, these take a minute.
    body = json.dumps({**ENDLESS, "stream": stream, "n": 64}).encode()
    address = ("127.0.0.1", served.status["port"])
    with socket.create_connection(address) as first, socket.create_connection(address) as second:
        first.sendall(head_of(len(body)) + body)
        wait_for(lambda: served.state["answering"] == 32 and served.state["waiting"] == 0)
        second.sendall(head_of(len(body)) + body)
        wait_for(lambda: served.state["waiting"] == 1)
    wait_for(lambda: served.state["answering"] == 0 and served.state["waiting"] == 0, seconds=5)


def test_a_killed_engine_is_a_503_and_comes_back(served: Served) -> None:
    with served.client() as client, client.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(served.state["engine_pid"], signal.SIGKILL)
        *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_ended"
    assert served.post(CHAT, **ASK).status_code == 200


def test_a_run_gets_the_card_and_clients_a_503(served: Served) -> None:
    (served.state_dir / "devices").mkdir(exist_ok=True)
    with (
        served.client() as client,
        client.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as answer,
        locked(served.state_dir / "devices" / "cpu.lock"),
    ):
        served.wait_for("yielded")
        *_, last = (line for line in answer.iter_lines() if line)
        assert "needs the memory of the CPU" in json.loads(last.removeprefix("data: "))["error"]["message"]
        # The process that held the GPU is gone.
        assert served.state["engine_pid"] == 0
        response = served.post(CHAT, **ASK)
        assert "needs the memory of the CPU" in error_of(response, 503)["message"]
        assert int(response.headers["Retry-After"]) > 0
        assert len(served.client().get("/models").json()["data"]) == 6
    served.wait_for("ready")


def test_a_deleted_checkpoint_is_an_error_in_words(served: Served) -> None:
    folder = served.run(SECOND).checkpoints_dir / "step-7"
    aside = folder.rename(folder.with_name("aside"))
    try:
        error = error_of(served.post(CHAT, **{**ASK, "model": f"{SECOND}:7"}), 404)
        assert error["code"] == "model_not_found"
    finally:
        aside.rename(folder)
    assert served.post(CHAT, **{**ASK, "model": f"{SECOND}:7"}).status_code == 200


def test_too_many_requests_are_told_to_wait(served: Served) -> None:
    """The queue has a bound: 96 open requests, of which 32 are computed."""
    body = json.dumps(ENDLESS).encode()
    connections = []
    try:
        for _ in range(96):
            connections.append(socket.create_connection(("127.0.0.1", served.status["port"])))
            connections[-1].sendall(head_of(len(body)) + body)
        wait_for(lambda: served.state["answering"] + served.state["waiting"] == 96)
        response = served.post(CHAT, **ASK)
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["Retry-After"]) > 0
    finally:
        for connection in connections:
            connection.close()
    wait_for(lambda: served.state["answering"] == 0)
