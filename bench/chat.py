"""How fast the chat answers, beside plain ``generate`` with the same adapter unmerged.

    python bench/chat.py MODEL [--adapter FOLDER] [--tokens 32] [--rounds 5]

Both hold the same NF4 base; without --adapter a random LoRA of rank 16 on all linear modules is made. Rounds
alternate, so that a busy machine slows both; ``cpu_times`` compares processor time, which other work on the
machine disturbs less (with OMP_NUM_THREADS=1, or threads that wait count too). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from qlora_tui.chat.session import load_session, model_folder
from qlora_tui.chat.terms import ADAPTER, GREEDY, ChatSource
from qlora_tui.data.conversation import Message
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.training.device import find_device
from qlora_tui.training.load import load_base

QUESTION = "Tell me about Paris and its history."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    recipe = Recipe(model=Model(id=args.model))
    with tempfile.TemporaryDirectory() as scratch:
        adapter = args.adapter or random_adapter(recipe, Path(scratch))
        ways = {"generate": by_generate(recipe, adapter), "chat": by_chat(recipe, adapter)}
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, answer in ways.items():
                # The difference of a long and a one-token answer: without reading the prompt.
                one, many = timed(answer, 1), timed(answer, args.tokens + 1)
                wall, cpu = ((b - a) / args.tokens for a, b in zip(one, many, strict=True))
                seconds[way].append((wall, cpu))
    rates = {way: 1 / statistics.median(wall for wall, _ in each) for way, each in seconds.items()}
    cpu_rates = {way: 1 / statistics.median(cpu for _, cpu in each) for way, each in seconds.items()}
    best = {way: 1 / min(wall for wall, _ in each) for way, each in seconds.items()}
    print(
        json.dumps(
            {
                "tokens_per_s": rates,
                "best": best,
                "times": rates["chat"] / rates["generate"],
                "cpu_times": cpu_rates["chat"] / cpu_rates["generate"],
            }
        )
    )


def timed(answer: Callable[[int], None], tokens: int) -> tuple[float, float]:
    """Seconds that ``answer`` takes for so many tokens, and seconds of processors."""
    began, cpu_began = time.perf_counter(), time.process_time()
    answer(tokens)
    return time.perf_counter() - began, time.process_time() - cpu_began


def random_adapter(recipe: Recipe, folder: Path) -> str:
    """An adapter that changes little."""
    import torch
    from peft import LoraConfig, get_peft_model

    device = find_device(recipe)
    tuned = get_peft_model(
        load_base(model_folder(recipe), recipe, device, "segments"),
        LoraConfig(r=16, target_modules="all-linear"),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    tuned.save_pretrained(str(folder))
    return str(folder)


def by_generate(recipe: Recipe, adapter: str) -> Callable[[int], None]:
    """As a script would: peft's model and ``generate``."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_tui.data.render import prompt_ids
    from qlora_tui.data.tokenizer import ChatTokenizer

    folder = model_folder(recipe)
    device = find_device(recipe)
    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.dtype,
    )
    # Not by our own loading, which keeps CPUs from the layout of 4-bit weights that answers fastest.
    base = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=device.dtype,
        device_map={"": device.torch_device},
        quantization_config=quantization,
    )
    model: Any = PeftModel.from_pretrained(base, adapter)
    model.eval()
    prompt = prompt_ids([Message("user", QUESTION)], ChatTokenizer.from_folder(folder))
    ids = torch.tensor([prompt], device=device.torch_device)

    def answer(tokens: int) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
        )

    return answer


def by_chat(recipe: Recipe, adapter: str) -> Callable[[int], None]:
    """As this program does."""
    session = load_session(ChatSource(recipe=recipe, adapters={ADAPTER: adapter}))
    session.end_ids = frozenset()

    def answer(tokens: int) -> None:
        for _ in session.ask(
            [Message("user", QUESTION)], voice=ADAPTER, sampling=replace(GREEDY, max_new_tokens=tokens)
        ):
            pass

    return answer


if __name__ == "__main__":
    main()
