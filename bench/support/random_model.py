"""A Llama of a given size with random weights, and conversations for it: no hub, no download.

``python -m bench.support.random_model FOLDER SIZE`` writes the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.training.selftest import write_random_model

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
}
"""Shapes of Qwen2.5-0.5B, Qwen2.5-1.5B and Llama-3.1-8B, as plain Llamas."""


def random_model(folder: Path, size: str) -> Path:
    """Return ``folder`` with the model in it, which another process creates if it is missing.

    A process that creates a model on a GPU holds GPU memory until it ends. Raises SystemExit with that
    process's output if it fails.
    """
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.draft")
        command = [sys.executable, "-m", "bench.support.random_model", str(draft), size]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        draft.rename(folder)
    return folder


def make_model(folder: Path, size: str) -> Path:
    """Write the model, with a tokenizer trained on the demo's texts."""
    import torch

    texts, device = CONVERSATIONS.read_text().splitlines(), "cuda" if torch.cuda.is_available() else "cpu"
    return write_random_model(folder, texts, device=device, **SIZES[size], tie_word_embeddings=size != "8b")


def make_rows(path: Path, count: int, long_words: int = 0) -> Path:
    """Write an Alpaca file of the demo's conversations with answers lengthened to ``long_words`` words."""
    turns = [json.loads(line)["messages"] for line in CONVERSATIONS.read_text().splitlines()]
    rows = []
    for number in range(count):
        question, answered = turns[number % len(turns)][-2:]
        words = f"{answered['content']} ".split(" ")
        more = -(-long_words // len(words)) if long_words else 1
        rows.append({"instruction": f"{number}. {question['content']}", "output": " ".join(words * more)})
    path.write_text(json.dumps(rows))
    return path


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), sys.argv[2])
