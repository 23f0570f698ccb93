"""Tokens per second of the server for one client and for eight, next to the chat and other ways.

    python -m bench.serve [RUN] [--tokens 48] [--rounds 3] [--transformers PYTHON] [--json]

Serves a run, by default the last that has an adapter. Plain ``generate`` (eager, peft's adapter unmerged) and
the chat's session are those of ``bench.chat``, each in its own process. A server that takes one request after
another gives the speed of plain ``generate`` to all its clients together. All take turns, whose order is
reversed every round. Medians count, of the tokens after the first; those of eight clients are added up.

With the Python of an environment that has fastapi, ``transformers serve`` is asked as the server is. It knows
no adapters on a base that is quantized while it is read: it serves the base alone, in the dtype of the run,
and so the server is asked for its base too. The threads of all processes wait in the same way.
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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import openai

from bench.baselines.runner import in_turn
from bench.chat import QUESTION
from bench.real_clients import run_to_serve, served
from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.chat.chat_types import BASE
from qlora_tui.gpu.torch_env import openmp_wait_policy
from qlora_tui.training.compute_device import find_device

CLIENTS = 8
TOPICS = ("Paris", "Rome", "the Moon", "bread", "trains", "rivers", "music", "chess")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run = run_to_serve(args.run)
    recipe = run.recipe()
    # Each process would choose by the load that the others make.
    os.environ.update(openmp_wait_policy(os.environ))
    command = [sys.executable, "-m", "bench.chat", recipe.model.id, "--adapter", str(run.adapter_dir)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as ends:
        ways: dict[str, Callable[[], float]] = {}
        for name, way in (("plain generate", "plain"), ("chat", "ours")):
            child = ends.enter_context(subprocess.Popen([*command, "--way", way], **pipes))
            # Without its input a child ends.
            ends.callback(child.stdin.close)
            ways[name] = partial(_by_child, child, args.tokens)
        servers = [("server", ends.enter_context(served(run.id)), run.id)]
        if args.transformers:
            model = str(model_folder(recipe))
            dtype = find_device(recipe).dtype_name
            other = ends.enter_context(_transformers(args.transformers, model, dtype))
            servers += [("server, base", servers[0][1], BASE), ("transformers serve, base", other, model)]
        for name, url, model in servers:
            for count in (1, CLIENTS):
                ways[f"{name}, {count} clients"] = partial(by_clients, url, model, count, args.tokens)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, args.rounds):
            for name in in_turn(ways, number):
                speed = ways[name]()
                if number >= 0:
                    speeds[name].append(speed)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    if args.json:
        print(json.dumps(medians))
        return 0
    plain = medians["plain generate"]
    print("| | tokens/s | |\n| --- | ---: | ---: |")
    for name, speed in medians.items():
        print(f"| {name} | {speed:.1f} | {speed / plain:.2f}× |")
    return 0


@contextmanager
def _transformers(python: str, model: str, dtype: str) -> Iterator[str]:
    """Serve a folder with ``transformers serve`` meanwhile; the address of the server."""
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


def by_clients(url: str, model: str, clients: int, tokens: int) -> float:
    """Return the tokens per second that clients get together, from when all have their first one."""
    each = asyncio.run(_times(url, model, clients, tokens))
    began, ended = max(one[0] for one in each), max(one[-1] for one in each)
    return sum(moment > began for one in each for moment in one) / (ended - began)


async def _times(url: str, model: str, clients: int, tokens: int) -> list[list[float]]:
    """Return when each token of each client arrived."""
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


def _by_child(child: subprocess.Popen[str], tokens: int) -> float:
    assert child.stdin and child.stdout
    print(json.dumps(["short", tokens]), file=child.stdin, flush=True)
    if not (line := child.stdout.readline()):
        raise SystemExit("A child ended; the reason is above.")
    return float(json.loads(line)["tokens_per_s"])


if __name__ == "__main__":
    sys.exit(main())
