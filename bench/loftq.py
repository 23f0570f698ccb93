"""How much nearer to the 16-bit model a run starts with LoftQ: KL divergence of the NF4 base, real model.

    python -m bench.loftq --data ALPACA.json [--rows 40] [--ranks 16,64] [--json]

Loads the model of ``qlora-tui demo`` in 16 bits and in NF4 with a new adapter, and compares their answers at
the trained tokens of the first rows, with the adapter as it starts without and with LoftQ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qlora_tui.catalog.lookup import load_architecture
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.demo.demo_model import ensure_model
from qlora_tui.demo.demo_run import PRESET
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.layering import build_recipe
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.adapter import add_lora, targets_by_name
from qlora_tui.training.compute_device import choose_attention, find_device
from qlora_tui.training.eval_mode import no_grad_eval
from qlora_tui.training.loftq import start_at_rounding_errors
from qlora_tui.training.model_loading import load_base


def main() -> int:
    """Measure each rank, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = ensure_model(lambda sentence: print(sentence, file=sys.stderr))
    sets = ["model.chat_template=chatml", "quantization.compute_dtype=float32"]
    recipe = build_recipe(preset=PRESET, sets=sets, model=str(folder), data=[str(args.data.absolute())])
    tokenizer = ChatTokenizer.from_folder(folder, recipe.model.chat_template)
    samples = prepare_dataset(recipe, tokenizer).train
    rows = [(list(samples.token_ids(i)), list(samples.loss_mask(i))) for i in range(args.rows)]
    exact = answers(load(folder, replace_setting(recipe, "quantization.method", "none")), rows)
    results = [measure(folder, recipe, int(rank), rows, exact) for rank in args.ranks.split(",")]
    for result in results:
        print(json.dumps(result) if args.json else result)
    return 0


def load(folder: Path, recipe: Recipe) -> Any:
    """The base as the recipe quantizes it."""
    device = find_device(recipe)
    return load_base(folder, recipe, device, choose_attention(recipe, device))


def measure(
    folder: Path, recipe: Recipe, rank: int, rows: list[tuple[list[int], list[int]]], exact: torch.Tensor
) -> dict[str, float]:
    """The figures of one rank; alpha is twice the rank."""
    recipe = replace_setting(replace_setting(recipe, "lora.rank", rank), "lora.alpha", 2.0 * rank)
    architecture = load_architecture(str(folder))
    model = add_lora(load(folder, recipe), recipe.lora, architecture)
    without = divergence(exact, answers(model, rows))
    started = time.monotonic()
    targets = targets_by_name(model.base_model.model, recipe.lora, architecture)
    share = start_at_rounding_errors(model, folder, targets)
    seconds = time.monotonic() - started
    return {
        "rank": rank,
        "tokens": len(exact),
        "kl_without": round(without, 4),
        "kl_with": round(divergence(exact, answers(model, rows)), 4),
        "share_of_squared_errors": round(share, 3),
        "seconds": round(seconds, 1),
    }


def answers(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Log-probabilities at each trained token, (tokens, vocabulary), in 16 bits."""
    parts = []
    with no_grad_eval(model):
        for ids, mask in rows:
            places = torch.tensor(mask[1:], dtype=torch.bool)
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1][places]
            parts.append(logits.float().log_softmax(-1).half())
    return torch.cat(parts)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean KL divergence in nats per token."""
    total = 0.0
    for one, other in zip(expected.split(256), actual.split(256), strict=True):
        wide = one.float()
        total += float((wide.exp() * (wide - other.float())).sum())
    return total / len(expected)


if __name__ == "__main__":
    sys.exit(main())
