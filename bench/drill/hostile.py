"""Rows of the drill: files made to take over the terminal, the machine or the program."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from bench.drill.program import Failure, call, write
from bench.drill.samples import ROWS

ESCAPES = (
    "\x1b]52;c;Q0xJUA==\x07",
    "\x1b]2;TITLE\x1b\\",
    "\x1b]8;;http://example.org\x1b\\",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x9d2;T\x9c",
    "\x85\x08\x0c\x7f",
    "\u202edrowssap\u2066",
)
"""Clipboard, title, link, clearing, the same as C1, overprinting, bidi."""
TEMPLATES = {
    "endless": "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
    "quiet and endless": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    "{{ n.s }}",
    "wide": "{{ '%0999999999d' % 7 }}",
    "wide by a filter": "{{ 'x' | center(2000000000) }}",
    "repeated": "{{ 'x' * 4000000000 }}",
    "a list repeated": "{{ [0] * 2000000000 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "formatted": "{{ '{:>2000000000}'.format(1) }}",
    "recursive": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "silent": "nothing of the messages",
    "empty": "",
    "raises": "{{ raise_exception('no') }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escapes by a filter": "{{ messages | attr('__class__') }}",
    "imports": "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "includes": "{% include '/etc/passwd' %}",
    "unknown filter": "{{ messages | nothing }}",
    "divides": "{{ 1 / 0 }}",
    "keys": "{{ messages[0].nothing.at.all }}",
    "syntax": "{% for %}",
    "not UTF-8": "\udcff",
    "control characters": "\x1b]2;T\x07{% for m in messages %}{{ m.content }}{% endfor %}",
}
BOMB_TEXT_BYTES = 1 << 31


def terminal(luck: random.Random, materials: Path, home: Path) -> None:
    """Escape sequences in rows, names of files and folders, and a preset."""
    escape = "".join(luck.sample(ESCAPES, luck.randint(1, 4)))
    name = escape.replace("/", "")
    row = {"messages": [{"role": "user", "content": escape}, {"role": "assistant", "content": f"a{escape}"}]}
    rows = write(home / f"rows{name}.jsonl", json.dumps(row).encode() + b"\n")
    folder = home / f"model{name}"
    shutil.copytree(materials / "model", folder)
    for words in (
        ("data", "inspect", str(rows)),
        ("data", "show", str(rows), "--model", str(folder)),
        ("estimate", "--model", str(folder), "--gpu-gib", "24"),
        ("attach", f"none{escape}"),
    ):
        call(*words).check()
        call(*words, "--json").check()


def template(luck: random.Random, materials: Path, home: Path) -> None:
    """A chat template that loops, swells, raises or reaches for code."""
    folder = home / "model"
    shutil.copytree(materials / "model", folder)
    text = TEMPLATES[luck.choice(list(TEMPLATES))]
    (folder / "chat_template.jinja").write_bytes(os.fsencode(text))
    rows = write(home / "rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    call("data", "show", str(rows), "--model", str(folder)).check()
    call("data", "inspect", str(rows), "--model", str(folder)).check()
    for place in (home, Path.cwd(), Path("/")):
        if (place / "canary").exists():
            raise Failure(f"the template {text!r} ran a command")


def bomb(luck: random.Random, materials: Path, home: Path) -> None:
    """A small file that is gigabytes when it is read."""
    name = luck.choice(list(BOMBS))
    path = write(home / name, BOMBS[name]())
    call("data", "inspect", str(path), seconds=60).check()
    call("data", "show", str(path), seconds=60).check()


def code(luck: random.Random, materials: Path, home: Path) -> None:
    """A model whose files name code, kernels or other repositories."""
    folder = home / "model"
    shutil.copytree(materials / "model", folder)
    canary = home / "ran"
    module = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    names = ("modeling_evil", "tokenization_evil", "configuration_evil", "torch", "tokenizers", "yaml")
    for name in names:
        write(folder / f"{name}.py", module.encode())
    target = luck.choice(("config.json", "tokenizer_config.json", "generation_config.json"))
    path = folder / target
    keys = json.loads(path.read_text()) if path.exists() else {}
    keys |= luck.choice(
        (
            {"auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}},
            {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.F"]}},
            {"_attn_implementation": "evil-org/kernel", "attn_implementation": "evil-org/kernel"},
            {"custom_generate": "evil-org/generate", "use_kernels": True},
            {"_name_or_path": "../../evil", "tokenizer_class": "tokenization_evil.T"},
        )
    )
    path.write_text(json.dumps(keys))
    rows = write(home / "rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    os.chdir(folder)
    try:
        call("estimate", "--model", str(folder), "--gpu-gib", "24").check()
        call("data", "inspect", str(rows), "--model", str(folder)).check()
    finally:
        os.chdir(materials)
    if canary.exists():
        raise Failure(f"{target} with {keys} ran a module of the model's folder")


def names(luck: random.Random, materials: Path, home: Path) -> None:
    """Names that lead out of the folders they are looked for in."""
    secret = write(home / "state" / "secret.toml", b'name = "SECRET-CONTENT"\n')
    depth = "../" * luck.randint(1, 8)
    name = luck.choice(
        (f"{depth}secret", f"{depth}secret.toml", str(secret), str(secret)[:-5], "..", ".", "/")
    )
    for words in (
        ("presets", "show", name),
        ("attach", name),
        ("resume", name),
        ("stop", name),
        ("runs", "delete", name),
        ("runs", "check", name),
    ):
        ended = call(*words)
        ended.check(codes=(1, 2))
        if "SECRET-CONTENT" in ended.output or not secret.exists():
            raise Failure(f"`{' '.join(words)}` reached {secret}")


def _zst_line() -> bytes:
    import zstandard

    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        writer.write(b'{"text": "')
        for _ in range(BOMB_TEXT_BYTES >> 20):
            writer.write(b"a" * (1 << 20))
        writer.write(b'"}\n')
    return out.getvalue()


def _gz_line() -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as writer:
        for _ in range(BOMB_TEXT_BYTES >> 22):
            writer.write(b"a" * (1 << 20))
    return out.getvalue()


def _dictionary_parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": rows}), out, compression="zstd")
    return out.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "line.jsonl.zst": _zst_line,
    "line.csv.gz": _gz_line,
    "line.txt.gz": _gz_line,
    "dictionary.parquet": _dictionary_parquet,
    "nested.json": lambda: b"[" * 5_000_000,
    "nested.jsonl": lambda: b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000 + b"\n",
    "number.json": lambda: b"[" + b"9" * 5_000_000 + b"]",
}
"""By file name: what to write."""
