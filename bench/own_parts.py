"""Parts that this project wrote itself, each beside the library that could replace it.

    python -m bench.own_parts {keys,workers,hub}

``keys``: the table that finds duplicate rows, beside a dict and beside numpy. ``workers``: the processes
that tokenize rows, beside ``ProcessPoolExecutor``. ``hub``: a search on the Hub, beside ``HfApi``. Each
measurement runs in a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from bench.data import write_rows
from qlora_tui.data.key_table import KeyTable
from qlora_tui.data.row_result import Batch, RowProcessor, RowResult, batches
from qlora_tui.data.worker_pool import WorkerPool, cores

KEY_COUNTS = (10_000, 200_000, 1_000_000, 5_000_000)
DATA_ROWS = 40_000
HUB_WAIT_S = 60.0
SURVIVAL_S = 10
_ENDLESS_BYTES = 1 << 30


class DictTable:
    """KeyTable over a dict."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def first(self, key: int, row: int) -> int | None:
        """Return the earlier row with ``key``, if any."""
        earlier = self._rows.setdefault(key, row)
        return None if earlier == row else earlier


class NumpyTable:
    """KeyTable over numpy arrays."""

    def __init__(self) -> None:
        import numpy

        self._zeros = lambda count: numpy.zeros(count, numpy.uint64)
        self._keys, self._rows, self._count = self._zeros(1 << 10), self._zeros(1 << 10), 0

    def first(self, key: int, row: int) -> int | None:
        """Return the earlier row with ``key``, if any."""
        slot = self._slot(key)
        if self._rows[slot]:
            return int(self._rows[slot]) - 1
        self._keys[slot], self._rows[slot] = key, row + 1
        self._count += 1
        if 2 * self._count > len(self._keys):
            keys, rows = self._keys, self._rows
            self._keys, self._rows = self._zeros(2 * len(keys)), self._zeros(2 * len(keys))
            for index in rows.nonzero()[0]:
                slot = self._slot(int(keys[index]))
                self._keys[slot], self._rows[slot] = keys[index], rows[index]
        return None

    def _slot(self, key: int) -> int:
        mask = len(self._keys) - 1
        slot = key & mask
        while self._rows[slot] and self._keys[slot] != key:
            slot = (slot + 1) & mask
        return slot


TABLES: dict[str, Callable[[], KeyTable | DictTable | NumpyTable]] = {
    "KeyTable": KeyTable,
    "dict": DictTable,
    "numpy": NumpyTable,
}


def measure_keys(table: str, count: int) -> None:
    """Print time and memory of ``count`` different keys."""
    own = psutil.Process()
    draw = random.Random(1).getrandbits
    first = TABLES[table]().first
    before, began = own.memory_info().rss, time.process_time()
    for row in range(count):
        first(draw(64), row)
    took = time.process_time() - began
    began = time.process_time()
    for _ in range(count):
        draw(64)
    took -= time.process_time() - began
    size = own.memory_info().rss - before
    print(f"{table:9} {count:9,} rows: {took / count * 1e6:.2f} µs a row, {size / 2**20:4.0f} MiB")


_processor: RowProcessor | None = None


def _set_processor(pickled: bytes) -> None:
    global _processor
    _processor = pickle.loads(pickled)


def _process(batch: Batch) -> list[RowResult]:
    assert _processor is not None
    return _processor.process(batch)


class ExecutorPool:
    """WorkerPool over ProcessPoolExecutor: as many batches under way, results in order."""

    def __init__(self, processor: RowProcessor, count: int) -> None:
        self._count = count
        self._executor = ProcessPoolExecutor(
            count,
            multiprocessing.get_context("spawn"),  # threads of the app and the tokenizer rule out fork
            _set_processor,
            (pickle.dumps(processor),),
        )

    def work(self, rows: Iterator[Batch]) -> Iterator[list[RowResult]]:
        """Yield the results of each batch, in order."""
        pending: deque[Future[list[RowResult]]] = deque()
        for batch in rows:
            pending.append(self._executor.submit(_process, batch))
            if len(pending) > 2 * self._count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        """Stop the processes."""
        self._executor.shutdown(cancel_futures=True)


POOLS: dict[str, type[WorkerPool] | type[ExecutorPool]] = {
    "WorkerPool": WorkerPool,
    "executor": ExecutorPool,
}


def _batches(path: Path) -> Iterator[Batch]:
    from qlora_tui.data.read import raw_rows
    from qlora_tui.data.sources import open_source
    from qlora_tui.recipe.schema import Source

    (file,) = open_source(Source(path=str(path)), "refuse")[0]
    return batches(file, raw_rows(path), lambda: True)


def measure_pool(pool: str, folder: Path, kill: str) -> None:
    """Print how long the rows take, and the memory of the process tree; or what follows on a ``kill``."""
    from qlora_tui.data.tokenizer import ChatTokenizer
    from qlora_tui.recipe.schema import Data

    processor = RowProcessor(Data(), ChatTokenizer.from_folder(folder))
    own = psutil.Process()
    began, rows, first_s, peak = time.perf_counter(), 0, 0.0, 0
    workers = POOLS[pool](processor, cores())
    try:
        for number, results in enumerate(workers.work(_batches(folder / "rows.jsonl"))):
            first_s = first_s or time.perf_counter() - began
            rows += len(results)
            if number % 20 == 0:
                tree = [own, *own.children(recursive=True)]
                peak = max(peak, sum(process.memory_full_info().pss for process in tree))
            if number == 20 and kill == "worker":
                own.children()[-1].kill()
            if number == 20 and kill == "parent":
                print(*(child.pid for child in own.children(recursive=True)), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    except BrokenProcessPool as error:
        print(f"{pool:10} after kill -9 of a worker: {type(error).__name__} after {rows:,} rows")
        return
    finally:
        workers.close()
    took = time.perf_counter() - began
    print(
        f"{pool:10} {f'after kill -9 of a {kill}: ' if kill else ''}{rows:,} rows in {took:.1f} s, the first "
        f"after {first_s * 1e3:.0f} ms, {peak / 2**20:.0f} MiB in all processes"
    )


def survivors(pool: str, folder: Path) -> None:
    """Print which processes outlive a parent that gets kill -9."""
    command = [sys.executable, "-m", "bench.own_parts", "workers", pool, str(folder), "parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()  # processes that live on keep the pipe open
    processes = []
    for pid in map(int, line.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=SURVIVAL_S)
    print(f"{pool:10} after kill -9 of the parent: {len(alive)} processes still run after {SURVIVAL_S} s")
    for process in alive:
        process.kill()


class _Server(BaseHTTPRequestHandler):
    """Responds with an error, never, or without end, by the start of the path."""

    mode = ""
    sent = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.mode == "silent":
            threading.Event().wait(HUB_WAIT_S)
        elif self.mode == "error":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.mode == "endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'["')
            while type(self).sent < _ENDLESS_BYTES:
                self.wfile.write(b"a" * (1 << 20))
                type(self).sent += 1 << 20


SEARCHES = {
    "ours": "from qlora_tui.catalog.hub import search_models as search; search('tiny')",
    "HfApi": "from huggingface_hub import HfApi; list(HfApi().list_models(search='tiny', limit=30))",
    "imports of ours": "import qlora_tui.catalog.hub; from huggingface_hub import get_session, get_token",
    "imports of HfApi": "from huggingface_hub import HfApi; HfApi()",
}


def measure_search(name: str, mode: str, url: str) -> None:
    """Print how a search ends, after how long and in how much memory."""
    _Server.mode, _Server.sent = mode, 0
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "1" if mode == "offline" else "0"}
    code = (
        f"import resource\ntry:\n {SEARCHES[name]}\n end = 'done'\n"
        "except Exception as error: end = type(error).__name__\n"
        "print(end, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=HUB_WAIT_S,
        )
        end, memory = done.stdout.split()
    except subprocess.TimeoutExpired:
        end, memory = "still waiting", "?"
    took = time.perf_counter() - began
    print(f"{name:16} {mode:9} {end}, {took:.2f} s, {memory} MiB, {_Server.sent >> 20} MiB sent", flush=True)


def main() -> None:
    """Print one comparison, or measure one side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["keys", "workers", "hub"])
    parser.add_argument("side", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    side: list[str] = args.side
    if args.part == "keys" and side:
        measure_keys(side[0], int(side[1]))
    elif args.part == "keys":
        for count in KEY_COUNTS:
            for table in TABLES:
                _again("keys", table, str(count))
    elif args.part == "workers" and side:
        measure_pool(side[0], Path(side[1]), side[2])
    elif args.part == "workers":
        with tempfile.TemporaryDirectory() as folder:
            _compare_pools(Path(folder))
    else:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("imports of ours", "imports of HfApi"):
            measure_search(name, "", "http://127.0.0.1:9")
        for mode in ("offline", "refused", "error", "endless", "silent"):
            for name in ("ours", "HfApi"):
                port = 9 if mode == "refused" else server.server_address[1]
                measure_search(name, mode, f"http://127.0.0.1:{port}")


def _compare_pools(folder: Path) -> None:
    from qlora_tui.data.stock_templates import stock_template
    from qlora_tui.training.random_model import write_tokenizer

    write_rows(folder / "rows.jsonl", DATA_ROWS)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = (folder / "rows.jsonl").read_text().splitlines()[:2000]
    write_tokenizer(folder, texts, stock_template("chatml", special, begins_with_bos=False), vocab_size=8000)
    for kill in ("", "", "worker"):
        for pool in POOLS:
            _again("workers", pool, str(folder), kill)
    for pool in POOLS:
        survivors(pool, folder)


def _again(*words: str) -> None:
    """Run this file with ``words`` in its own process."""
    subprocess.run([sys.executable, "-m", "bench.own_parts", *words], check=True)


if __name__ == "__main__":
    main()
