"""Whether a run on choices of the chat does what was chosen: always the shorter of two answers.

    python -m bench.chat_choices --data ALPACA.json [--prompts 44] [--tests 32] [--method orpo] [--json]

Lets the demo's model answer instructions twice each, at random, records the shorter answer of each pair as
the better one, as the key of the chat does, prepares the run that the chat offers, and compares the number of
tokens of the greedy answers to other instructions, adapter beside base, with a 95 % interval. State goes to
a temporary folder; the model of ``qlora-tui demo`` is read from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from qlora_tui.chat.chat_types import BASE, Sampling
from qlora_tui.data.conversation import Message
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.demo.demo_run import PRESET
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.chat_choices import Provenance, add_pair, recipe_on_choices
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.task_metrics.intervals import mean_interval

ANSWER_TOKENS = 192
"""Most tokens of an answer that is chosen from. With 64, most were cut off, and both were as long."""
TEST_TOKENS = 192
"""Most tokens of an answer that is counted."""


def main() -> int:
    """Answer, choose, train, count; print the lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=44, help="prompts that are answered twice")
    parser.add_argument("--tests", type=int, default=32)
    parser.add_argument("--method", default="", help="data.preferences of the run; empty: what the chat sets")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = str(ensure_model(lambda sentence: print(sentence, file=sys.stderr)))
    rows = [row["instruction"] for row in json.loads(args.data.read_text()) if not row.get("input")]
    prompts = [(Message("user", text),) for text in rows[: args.prompts + args.tests]]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = scratch
        sets = ["model.chat_template=chatml", "training.general_prompts=0", "data.validation_fraction=0"]
        recipe = build_recipe(preset=PRESET, sets=sets, model=model)
        chosen = choose_shorter(recipe, prompts[: args.prompts])
        recipe = recipe_on_choices(recipe, "pairs", "")
        if args.method:
            recipe = replace_setting(recipe, "data.preferences", args.method)
        run = create_run(recipe)
        subprocess.run(
            [sys.executable, "-m", "qlora_tui.training", run.path], check=True, stdout=subprocess.DEVNULL
        )
        base, adapter = greedy_lengths(run.adapter_dir, recipe, prompts[args.prompts :])
    low, high = mean_interval([after - before for before, after in zip(base, adapter, strict=True)])
    result = {
        "preferences": recipe.data.preferences,
        "pairs": len(chosen),
        "tokens_chosen": round(sum(pair[0] for pair in chosen) / len(chosen), 1),
        "tokens_rejected": round(sum(pair[1] for pair in chosen) / len(chosen), 1),
        "tests": len(base),
        "tokens_base": round(sum(base) / len(base), 1),
        "tokens_adapter": round(sum(adapter) / len(adapter), 1),
        "change_interval": [round(low, 1), round(high, 1)],
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0


def choose_shorter(recipe: Recipe, prompts: list[tuple[Message, ...]]) -> list[tuple[int, int]]:
    """Record the shorter of two answers to each prompt as the better one; tokens of both."""
    from qlora_tui.chat.chat_types import ChatSource
    from qlora_tui.chat.session import load_session

    session = load_session(ChatSource(recipe=recipe))
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=1.0)
    lengths = []
    for number, prompt in enumerate(prompts):
        outcomes: list[Any] = []
        for seed in (2 * number, 2 * number + 1):
            stream = session.ask(prompt, sampling=msgspec.structs.replace(sampling, seed=seed))
            list(stream)
            outcomes.append(stream.outcome)
        shorter, longer = sorted(outcomes, key=lambda outcome: outcome.new_tokens)
        if (
            shorter.ending != "turn end"
            or shorter.new_tokens == longer.new_tokens
            or not shorter.text.strip()
        ):
            continue
        provenance = Provenance(
            id=str(number),
            at=time.time(),
            base=recipe.model.id,
            run="",
            answers={"chosen": BASE, "rejected": BASE},
            sampling=msgspec.to_builtins(sampling),
        )
        add_pair(prompt, shorter.text.strip(), longer.text.strip(), provenance)
        lengths.append((shorter.new_tokens, longer.new_tokens))
    return lengths


def greedy_lengths(
    adapter: Path, recipe: Recipe, prompts: list[tuple[Message, ...]]
) -> tuple[list[int], list[int]]:
    """Tokens of the greedy answers of base and adapter."""
    from qlora_tui.chat.chat_types import ADAPTER, ChatSource
    from qlora_tui.chat.session import load_session

    session = load_session(ChatSource(recipe=recipe, adapters={ADAPTER: str(adapter)}))
    session.ensure_loaded(ADAPTER)
    ids = [session.prompt(prompt) for prompt in prompts]
    base, adapted = (
        [len(answer) for answer in session.greedy_batch(name, ids, TEST_TOKENS)] for name in (BASE, ADAPTER)
    )
    return base, adapted


if __name__ == "__main__":
    sys.exit(main())
