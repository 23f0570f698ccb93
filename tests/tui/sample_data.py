"""A model folder with config and tokenizer but no tensors, and data files to look at through it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.data.families import CHATML, tokenizer_json
from tests.tui.workstation import config_folder


def readable_model(home: Path, config: str = "HuggingFaceTB__SmolLM2-135M") -> str:
    """All the Data screen needs of a model, which has this config of ``tests/configs``; its folder."""
    folder = config_folder(home, config)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHATML}))
    # No tensor in it: nothing here reads any.
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return str(folder)


def tickets(path: Path, count: int = 40) -> Path:
    """Conversations of growing length, the last two of them odd: one twice, one without an answer."""
    rows: list[Any] = [ticket(n) for n in range(1, count - 1)]
    rows += [ticket(3), {"messages": [{"role": "user", "content": "Anyone there?"}]}]
    return write_rows(path, rows)


def ticket(number: int) -> dict[str, Any]:
    """One conversation; the answer of a higher number is longer."""
    answer = f"Parcel {number} is on its way. " + "It left the small depot in Oslo. " * (number // 4)
    return {
        "messages": [
            {"role": "user", "content": f"Where is parcel {number}?"},
            {"role": "assistant", "content": answer.strip()},
        ]
    }


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file; a text is written as it is, right or wrong."""
    with path.open("w") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path
