"""Running servers, read from their state files: address, models and current state.

A server on port 8000, for example, writes ``servers/8000.json`` in the state folder, replaces it within about
a second whenever its state changes, and deletes it when it ends. ``servers/8000.key`` contains its API key.
:mod:`qlora_tui.serving` writes both files. A server that was started in the background writes its output to
``servers/8000.log``, which is kept until the next server is started in the background on that port.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from qlora_tui import paths
from qlora_tui.decoding import read_json
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import list_folder, private_dir, read_regular
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.control import terminate
from qlora_tui.runs.process import ProcessIdentity, spawn_detached


class ServerStatus(Struct, frozen=True, kw_only=True):
    """The content of a state file."""

    process: ProcessIdentity
    address: str
    """Base URL, such as ``http://127.0.0.1:8000/v1``."""
    port: int
    base: str
    """The base model."""
    models: tuple[str, ...] = ()
    state: str = "unloaded"
    """``unloaded``, ``loading``, ``ready``, ``yielded`` to a run, or ``failed``."""
    detail: str = ""
    """What the server waits for or why it failed, in a sentence."""
    engine_pid: int = 0
    """Process id of the engine that holds the model; 0 if there is none."""
    memory_bytes: int = 0
    """Memory of the loaded model, without its KV cache."""
    is_local: bool = True
    """Whether only programs on this machine can reach the server."""
    key_file: str = ""
    """File with the API key; empty if no key is required."""
    requests: int = 0
    """Number of requests answered, successfully or not."""
    refused: int = 0
    """Number of requests answered with an error."""
    answering: int = 0
    """Number of answers that are being computed."""
    waiting: int = 0
    """Number of requests that wait."""
    tokens_per_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def default_model(self) -> str:
        """The first model other than the base; the base if there is no other."""
        return self.models[1] if len(self.models) > 1 else self.models[0]


LOOPBACK = "127.0.0.1"
_POLL_S = 0.05
_START_S = 30.0
"""Maximum seconds until a server that was started in the background accepts connections."""
_STOP_S = 10.0
_DECODER = msgspec.json.Decoder(ServerStatus)


def servers_dir() -> Path:
    """Return the folder of the state files."""
    return private_dir(paths.state_dir() / "servers")


def state_path(port: int) -> Path:
    """Return the path of the state file of the server on a port."""
    return servers_dir() / f"{port}.json"


def key_path(port: int) -> Path:
    """Return the path of the key of the server on a port."""
    return servers_dir() / f"{port}.key"


def running_servers() -> list[ServerStatus]:
    """Return the running servers, ordered by port."""
    folder = paths.state_dir() / "servers"
    statuses = (read_json(path, _DECODER) for path in list_folder(folder) if path.suffix == ".json")
    running = [status for status in statuses if status is not None and status.process.is_alive()]
    return sorted(running, key=lambda status: status.port)


def server_on(port: int) -> ServerStatus | None:
    """Return the running server on a port; None if there is none."""
    return next((server for server in running_servers() if server.port == port), None)


@changes_box
def start_in_background(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> ServerStatus:
    """Start ``qlora-tui serve`` in a process that outlives this one, and return once it listens.

    Raises UserError if the process ends before that, or does not listen within 30 seconds.
    """
    # A running server on the same port still writes to its own log.
    log_path = servers_dir() / f"start-{os.getpid()}.log"
    with disk_problems(), log_path.open("wb") as log:
        process = spawn_detached("qlora_tui", "serve", *arguments, output=log, environ=environ)
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        started = next((each for each in running_servers() if each.process.pid == process.pid), None)
        if started is not None:
            with disk_problems():
                log_path.replace(log_path.with_name(f"{started.port}.log"))
            return started
        time.sleep(_POLL_S)
    with disk_problems():
        log_path = log_path.replace(log_path.with_name("not-started.log"))
    output = read_regular(log_path).decode(errors="replace").strip().removeprefix("qlora-tui: ")
    title, _, what = output.partition(": ")
    if not what or process.poll() is None:
        title, what = "The server did not start", output or "The server printed nothing."
    raise UserError(title, what=" ".join(what.split()), fix=f"The server's output is in {log_path}.")


@changes_box
def stop_server(server: ServerStatus) -> None:
    """Stop a server, which frees the GPU within seconds. Raises UserError if it continues."""
    if terminate(server.process):
        server.process.wait(_STOP_S)
    if server.process.is_alive():
        raise UserError(
            "The server is still running",
            what=f"PID {server.process.pid} did not end within ten seconds.",
            fix=f"End it: `kill -9 {server.process.pid}`.",
        )
