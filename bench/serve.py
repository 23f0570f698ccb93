"""Tokens per second of the server for one client and for eight, compared with the chat and other methods.

    python -m bench.serve [RUN] [--tokens 48] [--rounds 3] [--transformers PYTHON] [--json]

Serves a run, by default the last one with an adapter. The Chat screen is the app's, in a terminal of 80×24
characters. Plain ``generate`` (eager, peft's adapter unmerged) and the chat's session come from
``bench.chat``, each in a separate process that passes its tokens to nobody. A server that takes one request
after another gives all its clients together the speed of plain ``generate``. All methods take turns, whose
order is reversed every round. Medians over the tokens after the first are reported, and for eight clients
their sum. The last column is the CPU time per token outside the engine: of the app, or of server and clients.

With the Python of an environment that has fastapi, ``transformers serve`` answers the same requests. It
supports no adapters on a base that is quantized while loading, so it serves only the base, in the dtype of
the run, and the server is asked for its base too. The threads of all processes wait in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import openai
import psutil

from bench.baselines.runner import in_turn
from bench.chat import QUESTION
from bench.real_clients import run_to_serve, served
from bench.terminal import Terminal
from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.chat.chat_types import BASE, GenerationResult
from qlora_tui.gpu.torch_env import openmp_wait_policy
from qlora_tui.runs.directory import RunDir
from qlora_tui.training.compute_device import find_device

CLIENTS = 8
_TYPED_S = 0.7
_ERASE = "\x05\x15"
"""Keys that clear a field."""
TOPICS = ("Paris", "Rome", "the Moon", "bread", "trains", "rivers", "music", "chess")


class Speed(NamedTuple):
    """Speed of an answer."""

    tokens_per_s: float
    delivery_s: float = 0.0
    """CPU time per token outside the engine; 0 if there is no engine, or not ours."""


def main() -> int:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--screen", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.screen:
        return _app(args.screen)
    run = run_to_serve(args.run)
    recipe = run.recipe()
    # Otherwise each process would choose by the load that the others cause.
    os.environ.update(openmp_wait_policy(os.environ))
    command = [sys.executable, "-m", "bench.chat", recipe.model.id, "--adapter", str(run.adapter_dir)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as ends:
        ways: dict[str, Callable[[], Speed]] = {}
        for name, way in (("plain generate", "plain"), ("the chat's session", "ours")):
            child = ends.enter_context(subprocess.Popen([*command, "--way", way], **pipes))
            ways[name] = partial(_by_child, child, args.tokens)
        ways["the Chat screen"] = ends.enter_context(ChatScreen(run, args.tokens)).ask
        url, pid = ends.enter_context(served(run.id))
        servers = [("server", url, run.id, pid)]
        if args.transformers:
            model = str(model_folder(recipe))
            dtype = find_device(recipe).dtype_name
            other = ends.enter_context(_transformers(args.transformers, model, dtype))
            servers += [("server, base", url, BASE, pid), ("transformers serve, base", other, model, 0)]
        for name, address, model, process in servers:
            for count in (1, CLIENTS):
                ways[f"{name}, {count} clients"] = partial(
                    by_clients, address, model, count, args.tokens, process
                )
        speeds: dict[str, list[Speed]] = {name: [] for name in ways}
        for number in range(-1, args.rounds):
            for name in in_turn(ways, number):
                speed = ways[name]()
                if number >= 0:
                    speeds[name].append(speed)
    medians = {name: Speed(*map(statistics.median, zip(*each, strict=True))) for name, each in speeds.items()}
    if args.json:
        print(json.dumps({name: speed._asdict() for name, speed in medians.items()}))
        return 0
    plain = medians["plain generate"].tokens_per_s
    print("| | tokens/s | | ms of processor per token |\n| --- | ---: | ---: | ---: |")
    for name, (per_s, delivery_s) in medians.items():
        delivery = f"{1000 * delivery_s:.1f}" if delivery_s else ""
        print(f"| {name} | {per_s:.1f} | {per_s / plain:.2f}× | {delivery} |")
    return 0


class ChatScreen:
    """The app in a terminal, whose Chat screen answers greedily with the run's adapter."""

    def __init__(self, run: RunDir, tokens: int) -> None:
        self._run, self._tokens = run, tokens
        self._ends = ExitStack()

    def __enter__(self) -> Self:
        folder = Path(self._ends.enter_context(tempfile.TemporaryDirectory()))
        # The only run, which is therefore the one that is opened.
        runs = folder / "qlora-tui" / "runs"
        runs.mkdir(parents=True)
        (runs / self._run.id).symlink_to(self._run.path)
        self._speeds = folder / "speeds"
        self._speeds.touch()
        command = [sys.executable, "-m", "bench.serve", f"--screen={self._speeds}"]
        self._terminal = self._ends.enter_context(Terminal(command, env={"XDG_STATE_HOME": str(folder)}))
        self._terminal.wait_for("Chat")
        for keys, shown in (
            (("7",), "One answer"),
            (("a",), "only adapter answers"),
            (("o",), "cumulative probability limit"),
            # Temperature and the maximum number of tokens are the first and the fifth field.
            ((f"{_ERASE}0", *"\t\t\t\t", f"{_ERASE}{self._tokens}", "\r"), f"≤ {self._tokens} tokens"),
        ):
            self._type(*keys)
            self._terminal.wait_for(shown)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _type(self, *keys: str) -> None:
        """Press keys one after another, because each may move the focus."""
        for each in keys:
            self._terminal.press(each)
            self._terminal.watch(_TYPED_S)

    def ask(self) -> Speed:
        """Ask in a new conversation, and return the speed."""
        self._type("\x1b", "x", "i", QUESTION)
        self._terminal.press("\r")
        known, before = len(self._speeds.read_text().splitlines()), self._terminal.cpu_s()
        while len(lines := self._speeds.read_text().splitlines()) == known:
            self._terminal.read(0.5)
        tokens, speed = json.loads(lines[-1])
        return Speed(speed, (self._terminal.cpu_s() - before) / tokens)


def _app(speeds: Path) -> int:
    """Run the app, and append tokens and exact speed of each answer to a file; its screen rounds them."""
    from qlora_tui.cli import main as app
    from qlora_tui.tui.screens.chat.turn import AdapterAnswer

    end = AdapterAnswer.end

    async def noted(answer: AdapterAnswer, outcome: GenerationResult) -> None:
        await end(answer, outcome)
        with speeds.open("a") as file:
            print(json.dumps([outcome.new_tokens, outcome.tokens_per_s]), file=file)

    AdapterAnswer.end = noted  # type: ignore[assignment, method-assign]  # no message tells of it
    return app([])


@contextmanager
def _transformers(python: str, model: str, dtype: str) -> Iterator[str]:
    """Run ``transformers serve`` on a folder inside the block; yield its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    argv = [
        python,
        "-m",
        "transformers.cli.transformers",
        "serve",
        model,
        f"--port={port}",
        f"--dtype={dtype}",
    ]
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ) as server:
        try:
            while server.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    yield f"http://127.0.0.1:{port}/v1"
                    return
                time.sleep(0.2)
            raise SystemExit("transformers serve ended: does its environment have fastapi?")
        finally:
            server.terminate()


def by_clients(url: str, model: str, clients: int, tokens: int, pid: int) -> Speed:
    """Return the total tokens per second of all clients, from the time at which each has its first token."""
    before = _cpu_s(pid)
    each = asyncio.run(_times(url, model, clients, tokens))
    delivery_s = (_cpu_s(pid) - before) / sum(map(len, each))
    began, ended = max(one[0] for one in each), max(one[-1] for one in each)
    return Speed(sum(moment > began for one in each for moment in one) / (ended - began), delivery_s)


def _cpu_s(pid: int) -> float:
    """Return the CPU time of this process, which runs the clients, plus the server's; 0 without a server."""
    if not pid:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return time.process_time() + times.user + times.system


async def _times(url: str, model: str, clients: int, tokens: int) -> list[list[float]]:
    """Return the time at which each token of each client arrived."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def times(topic: str) -> list[float]:
            stream = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTION.replace("Paris", topic)}],
                temperature=0,
                max_tokens=tokens,
                stream=True,
            )
            return [time.perf_counter() async for chunk in stream if chunk.choices[0].delta.content]

        return await asyncio.gather(*(times(topic) for topic in TOPICS[:clients]))


def _by_child(child: subprocess.Popen[str], tokens: int) -> Speed:
    assert child.stdin and child.stdout
    print(json.dumps(["short", tokens]), file=child.stdin, flush=True)
    if not (line := child.stdout.readline()):
        raise SystemExit("A child ended; the reason is above.")
    return Speed(json.loads(line)["tokens_per_s"])


if __name__ == "__main__":
    sys.exit(main())
