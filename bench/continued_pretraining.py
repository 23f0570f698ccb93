"""Continued pretraining of a real model: LoRA alone, and with embedding and head trained too.

    python -m bench.continued_pretraining [--steps 24] [--export] [--json]

Trains the demo's model on this project's own documentation as plain text, once without and once with
``lora.train_embeddings``, each in a process as the runner starts it. Reports the validation loss, the peak of
the process beside its estimate, and CPU time; with ``--export`` also how near the merged model as F16 answers
in llama.cpp. State goes to a temporary folder; the model of ``qlora-tui demo`` is read from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.view import RunView

PAGES = Path(__file__).parents[1] / "docs"


def main() -> int:
    """Train both; print a line each, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = str(ensure_model(lambda sentence: print(sentence, file=sys.stderr)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = folder
        data = Path(folder) / "pages.jsonl"
        texts = [page.read_text() for page in sorted(PAGES.rglob("*.md"))]
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for train_embeddings in (False, True):
            result = train(model, data, args.steps, train_embeddings=train_embeddings)
            if args.export:
                result["f16_divergence"] = exported(RunDir(Path(result["run"])), Path(folder) / "gguf")
            print(json.dumps(result) if args.json else line(result), flush=True)
    return 0


def train(model: str, data: Path, steps: int, *, train_embeddings: bool) -> dict[str, Any]:
    """One run with the preset's settings, as its events and the system report it."""
    sets = [
        f"lora.train_embeddings={'true' if train_embeddings else 'false'}",
        "lora.rank=32",
        "data.max_length=512",
        "training.gradient_accumulation=2",
        "training.learning_rate=2e-4",
        "training.embedding_learning_rate=2e-5",
        "training.epochs=40",
        f"training.max_steps={steps}",
        f"training.eval_every={steps}",
        "training.gradient_checkpointing=off",
        "training.general_prompts=0",
    ]
    run = create_run(build_recipe(preset="continued-pretraining", sets=sets, model=model, data=[str(data)]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with run.log_path.open("wb") as log:
        subprocess.run([sys.executable, "-m", "qlora_tui.training", run.path], check=True, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    view = RunView(run)
    view.refresh()
    assert view.memory is not None and view.adapter is not None
    return {
        "run": str(run.path),
        "train_embeddings": train_embeddings,
        "trained_parameters": view.adapter.trained_parameters,
        "validation_loss": [e.loss for e in view.evaluations],
        "estimated_bytes": view.memory.estimated_bytes,
        "peak_bytes": view.memory.measured_bytes,
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
    }


def exported(run: RunDir, out: Path) -> float:
    """Export the run as F16; the mean KL divergence from the trained model, in nats."""
    command = [sys.executable, "-m", "qlora_tui", "export", "gguf", run.id, str(out / run.id), "--json"]
    done = subprocess.run([*command, "--quant", "F16"], check=True, capture_output=True, text=True)
    divergence: float = json.loads(done.stdout.splitlines()[-1])["files"][0]["proof"]["divergence"]
    return divergence


def line(result: dict[str, Any]) -> str:
    """One run in a line."""
    mib = 2**20
    loss = " → ".join(f"{each:.3f}" for each in result["validation_loss"])
    peak, estimated = result["peak_bytes"] / mib, result["estimated_bytes"] / mib
    name = "LoRA, embedding and head" if result["train_embeddings"] else "LoRA alone"
    more = f"  F16: KL {result['f16_divergence']:.2g}" if "f16_divergence" in result else ""
    return (
        f"{name:<25} validation loss {loss}  peak {peak:,.0f} MiB, estimated {estimated:,.0f}  "
        f"CPU {result['cpu_s']:.0f} s{more}"
    )


if __name__ == "__main__":
    sys.exit(main())
