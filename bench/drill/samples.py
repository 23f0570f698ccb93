"""Valid files of every kind that the program reads, small; and a model and a run that other files go with."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MODEL = """
import sys
from pathlib import Path
from typing import Any
from bench.support.random_model import make_model
from bench.tiny_gguf import write_tiny_gguf
make_model(Path(sys.argv[1]) / "model", "tiny")
write_tiny_gguf(Path(sys.argv[1]) / "tiny.gguf")
"""
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is the color of fox {number}?"},
            {"role": "assistant", "content": f"Fox {number} is {('red', 'brown', 'gray')[number % 3]}."},
        ]
    }
    for number in range(24)
]
ALPACA = [{"instruction": f"Add {n} and 1.", "input": "", "output": f"{n + 1}"} for n in range(24)]


def make_model_files(folder: Path) -> None:
    """Write ``model/`` (a random Llama with a tokenizer) and ``tiny.gguf``, in a process of their own.

    This process stays without torch: children are forked from it.
    """
    command = [sys.executable, "-c", _MODEL, str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])


def jsonl() -> bytes:
    """Chats, a row a line."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def table(separator: str) -> bytes:
    """Alpaca rows as CSV or TSV."""
    lines = [separator.join(ALPACA[0])]
    lines += [separator.join(row.values()) for row in ALPACA]
    return "\n".join(lines).encode()


def parquet() -> bytes:
    """Alpaca rows."""
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(_arrow_table(), out, compression="snappy")
    return out.getvalue()


def arrow() -> bytes:
    """Alpaca rows as a stream of record batches, which is what ``datasets`` keeps."""
    import pyarrow as pa

    out = io.BytesIO()
    data = _arrow_table()
    with pa.ipc.new_stream(out, data.schema) as writer:
        writer.write_table(data, max_chunksize=8)
    return out.getvalue()


def _arrow_table() -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(ALPACA)


def zst() -> bytes:
    """Chats, compressed with Zstandard."""
    import zstandard

    return zstandard.compress(jsonl())


DATA: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.json": lambda: json.dumps(ALPACA).encode(),
    "rows.csv": lambda: table(","),
    "rows.tsv": lambda: table("\t"),
    "rows.txt": lambda: ("A fox is red.\n\nAn owl is gray.\n\n" * 40).encode(),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "rows.jsonl.gz": lambda: gzip.compress(jsonl(), mtime=0),
    "rows.jsonl.zst": zst,
}
"""By file name."""
PRESET = b"""\
# A preset.
name = "drill"

[lora]
rank = 8
targets = ["q_proj", "v_proj"]

[training]
learning_rate = 2e-4
max_steps = 4
"""
CONFIG = b"""\
theme = "harbour"
model_folders = ["/models"]

[notify]
bell = false
"""
