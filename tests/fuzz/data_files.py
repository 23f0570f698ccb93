"""Whole data files of each kind, to be damaged."""

from __future__ import annotations

import gzip
import json
from typing import Any

import zstandard

PAIRS = [{"instruction": f"Frage {n} — 你好\n", "input": "", "output": f'a\t{n} "x"'} for n in range(6)]
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "é"}]},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "ok", "weight": 0.5},
        ],
        "tools": '[{"name": "f"}]',
    },
]
SHARED = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
] * 3


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode()


SEEDS: dict[str, bytes] = {
    "pairs.jsonl": lines(PAIRS),
    "chats.jsonl": lines(CHATS * 2),
    "pairs.json": json.dumps(PAIRS, indent=1).encode(),
    "held.json": json.dumps({"data": SHARED}).encode(),
    "shared.json": json.dumps(SHARED, ensure_ascii=False).encode(),
    "rows.csv": b'text,label\n"a, ""b""",0\nc,1\n"long\nline",0\n',
    "rows.tsv": "question\tanswer\nq é\ta\nq2\ta2\n".encode(),
    "poem.txt": "one\ntwo — é\n\nthree\n".encode(),
    "pairs.jsonl.gz": gzip.compress(lines(PAIRS), mtime=0),
    "pairs.json.zst": zstandard.compress(json.dumps(PAIRS).encode()),
    "no-suffix": lines(PAIRS),
}
