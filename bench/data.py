"""Tokenizing rows for training: this program compared with TRL's own preparation of the same rows.

    python -m bench.data --model FOLDER [--rows 200000] [--repeats 3] [--skip-trl]

Writes ``--rows`` conversations to a JSONL file, then runs both sides in turns from this file to samples with
an assistant mask, each time without caches and in a separate process. Prints rows per second, CPU seconds,
and the peak memory of the process tree (the sum of resident sizes, sampled), as medians of all repeats. The
model folder provides the tokenizer; both use the chat template of Qwen2.5 from ``trl``. TRL runs with its
defaults and with one worker per core, and the faster of the two is reported. Only this program holds rows out
for validation.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

_WORDS = [
    *("time", "people", "water", "light", "house", "story", "river", "winter", "market"),
    *("answer", "number", "picture", "machine", "garden", "window", "doctor", "letter"),
    *("question", "small", "green", "simple", "strong", "quiet", "useful", "careful"),
    *("several", "because", "although", "between", "explain", "describe", "compare"),
    *("summarize", "translate", "consider", "improve", "remember", "follow", "write"),
]


class Clock:
    """Measures elapsed seconds, and CPU seconds of this process and its finished children."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._cpu = sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        """Return the seconds since the clock was created."""
        cpu_s = sum(os.times()[:4]) - self._cpu
        return {"seconds": round(time.perf_counter() - self._began, 2), "cpu_s": round(cpu_s, 2)}


def write_rows(path: Path, count: int) -> None:
    """Write conversations of one to three exchanges, with about 200 tokens each."""
    chance = random.Random(5)

    def text(low: int, high: int) -> str:
        words = (chance.choice(_WORDS) for _ in range(chance.randint(low, high)))
        return " ".join(
            word if chance.random() < 0.9 else f"{word}, {chance.randrange(1000)}" for word in words
        )

    with path.open("w") as file:
        for number in range(count):
            turns = []
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                turns.append({"role": "user", "content": f"{number}: {text(8, 40)}?"})
                turns.append({"role": "assistant", "content": f"{text(20, 160)}."})
            file.write(json.dumps({"messages": turns}) + "\n")


def qwen_template() -> str:
    """Return Qwen2.5's published template from the installed trl."""
    trl_spec = importlib.util.find_spec("trl")
    if trl_spec is None or trl_spec.origin is None:
        raise SystemExit("trl is not installed: pip install --no-deps trl")
    return (Path(trl_spec.origin).parent / "chat_templates" / "qwen2_5.jinja").read_text()


def ours(path: Path, model: Path) -> dict[str, Any]:
    """Run this program from the file to a memory-mapped data set, without caches."""
    from qlora_tui.data.dataset import prepare_dataset
    from qlora_tui.data.tokenizer import ChatTokenizer
    from qlora_tui.recipe.schema import Data, Recipe, Source

    own = ChatTokenizer.from_folder(model)
    tokenizer = ChatTokenizer(own.backend.to_str(), own.special_tokens, qwen_template())
    clock = Clock()
    prepared = prepare_dataset(Recipe(data=Data(sources=(Source(path=str(path)),))), tokenizer)
    counts = prepared.counts
    return {**clock.read(), "tokens": counts.tokens, "trained": counts.trained_tokens}


def theirs(path: Path, model: Path, workers: int | None) -> dict[str, Any]:
    """Run TRL from the file to the data that SFTTrainer would train on, without caches."""
    import datasets
    import transformers

    trl: Any = importlib.import_module("trl")

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = qwen_template()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    args = trl.SFTConfig(
        output_dir=str(path.parent / "out"),
        assistant_only_loss=True,
        max_length=1024,
        dataset_num_proc=workers,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    network = transformers.LlamaForCausalLM(config)
    clock = Clock()
    rows: Any = datasets.load_dataset("json", data_files=str(path), split="train")
    trainer: Any = trl.SFTTrainer(model=network, args=args, train_dataset=rows, processing_class=tokenizer)
    took = clock.read()
    first = trainer.train_dataset[0]
    return {
        **took,
        "columns": sorted(first),
        "trained_first_row": sum(label != -100 for label in first["labels"]),
    }


def measured(words: list[str], home: Path) -> dict[str, Any]:
    """Run this file with ``words`` in a process; return its result and the peak memory of its tree."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.data", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                tree = [root, *root.children(recursive=True)]
                peak = max(peak, sum(process.memory_info().rss for process in tree))
            except psutil.Error:
                continue
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, error = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(error.decode())
    return {**json.loads(out.decode().splitlines()[-1]), "peak_mib": round(peak / 2**20)}


def compare(results: dict[str, list[dict[str, Any]]], rows: int) -> None:
    """Print the medians, and the ratios to the faster variant of TRL."""
    middle = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_s", "peak_mib")}
        for side, runs in results.items()
    }
    print(f"\n{'median':12} {'rows/s':>9} {'CPU s':>9} {'peak MiB':>9}")
    for side, seconds in middle.items():
        rate = rows / seconds["seconds"]
        print(f"{side:12} {rate:9,.0f} {seconds['cpu_s']:9,.1f} {seconds['peak_mib']:9,.0f}")
    if len(middle) > 1:
        mine = middle["ours"]
        other = min((side for side in middle if side != "ours"), key=lambda side: middle[side]["seconds"])
        theirs_ = middle[other]
        print(
            f"\nours beside {other}: {theirs_['seconds'] / mine['seconds']:.2f}× the rows/s, "
            f"{mine['cpu_s'] / theirs_['cpu_s']:.2f}× the CPU time, "
            f"{mine['peak_mib'] / theirs_['peak_mib']:.2f}× the memory"
        )


def main() -> None:
    """Print the comparison, or run one side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a model folder, for its tokenizer")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3, help="how often each side runs, in turn")
    parser.add_argument("--skip-trl", action="store_true", help="ours alone")
    parser.add_argument("--side", choices=["ours", "trl", "trl-workers"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "ours":
        print(json.dumps(ours(args.file, args.model)))
        return
    if args.side:
        print(
            json.dumps(theirs(args.file, args.model, os.cpu_count() if args.side == "trl-workers" else None))
        )
        return
    sides = ["ours"] if args.skip_trl else ["ours", "trl", "trl-workers"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, args.rows)
        print(f"{args.rows:,} rows, {file.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores", flush=True)
        for repeat in range(args.repeats):
            for side in sides:
                words = ["--model", str(args.model), "--side", side, "--file", str(file)]
                home = Path(folder) / "home"
                home.mkdir()
                result = measured(words, home)
                shutil.rmtree(home)
                results[side].append(result)
                rate = args.rows / result["seconds"]
                print(
                    f"{repeat + 1} {side:12} {rate:8,.0f} rows/s {result['cpu_s']:8,.1f} CPU s "
                    f"{result['peak_mib']:6,} MiB",
                    flush=True,
                )
    compare(results, args.rows)


if __name__ == "__main__":
    main()
