"""Speed and memory of the chat, beside plain ``generate`` with the same adapter unmerged.

    python -m bench.chat MODEL [--adapter FOLDER] [--tokens 48] [--rounds 7] [--json]

Both hold the same NF4 base, each in a separate process; without --adapter a random LoRA of rank 16 on all
linear modules is made. They answer in turns whose order is reversed every round, so that a busy machine slows
both: a short question, and one of some 600 tokens. Medians count. Processor time is what other work on the
machine disturbs least (with OMP_NUM_THREADS=1, or threads that wait count too). Plain ``generate`` looks for
no end of its turn, and its threads wait for each other as ours do.

On a GPU the table says how many tokens a CUDA graph gave, or why none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.baselines.runner import in_turn
from qlora_tui.chat.chat_types import ADAPTER, GREEDY, ChatSource
from qlora_tui.data.conversation import Message
from qlora_tui.gpu.torch_env import configure_torch_env, faster_imports
from qlora_tui.recipe.schema import Model, Recipe

QUESTION = "Tell me about Paris and its history."
QUESTIONS = {"short": QUESTION, "long": f"{QUESTION} " * 70}
WAYS = ("plain", "ours")


@dataclass(frozen=True)
class Answered:
    """One answer: its tokens after the first are counted a second."""

    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float
    cpu_s: float
    """Of processors, for all of it."""
    peak_bytes: int
    """The process's so far, libraries and all."""
    text: str
    recorded_tokens: int = 0
    """Tokens that a CUDA graph gave."""
    note: str = ""
    """Why none did."""


Answer = Callable[[str, int], Answered]
"""Answers a question in a given number of tokens."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        # Both: threads that spin on a busy machine would make plain ``generate`` many times slower.
        configure_torch_env()
        with faster_imports():
            import peft  # noqa: F401
        recipe = Recipe(model=Model(id=args.model))
        serve((by_generate if args.way == "plain" else by_chat)(recipe, args.adapter))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        adapter = args.adapter or random_adapter(Recipe(model=Model(id=args.model)), Path(scratch))
        report = summary(answered(args.model, adapter, args.tokens, args.rounds))
    print(json.dumps(report) if args.json else table(report))
    return 0


def answered(model: str, adapter: str, tokens: int, rounds: int) -> dict[str, dict[str, list[Answered]]]:
    """Answers by way and question length; one warm-up first."""
    command = [sys.executable, "-m", "bench.chat", model, "--adapter", adapter, "--way"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as ends:
        children = {way: ends.enter_context(subprocess.Popen([*command, way], **pipes)) for way in WAYS}
        return _in_turns(children, tokens, rounds)


def _in_turns(
    children: dict[str, subprocess.Popen[str]], tokens: int, rounds: int
) -> dict[str, dict[str, list[Answered]]]:
    answers: dict[str, dict[str, list[Answered]]] = {way: {name: [] for name in QUESTIONS} for way in WAYS}
    for number in range(-1, rounds):
        for way in in_turn(WAYS, number):
            child = children[way]
            assert child.stdin and child.stdout
            for name in QUESTIONS:
                print(json.dumps([name, tokens]), file=child.stdin, flush=True)
                if not (line := child.stdout.readline()):
                    raise SystemExit(f"{way} ended; the reason is above.")
                answer = Answered(**json.loads(line))
                if number >= 0:
                    answers[way][name].append(answer)
    return answers


def summary(answers: dict[str, dict[str, list[Answered]]]) -> dict[str, Any]:
    """Medians by length of question and way, and whether both said the same."""
    report: dict[str, Any] = {}
    for name in QUESTIONS:
        report[name] = {way: _medians(answers[way][name]) for way in answers}
        report[name]["same_text"] = len({each.text for way in WAYS for each in answers[way][name]}) == 1
        report[name]["ratio"] = report[name]["ours"]["tokens_per_s"] / report[name]["plain"]["tokens_per_s"]
    report["note"] = next((each.note for each in answers["ours"]["short"] if each.note), "")
    return report


def table(report: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| | plain `generate` | qlora-tui | |", "| --- | ---: | ---: | ---: |"]
    for name in QUESTIONS:
        plain, ours = (report[name][way] for way in WAYS)
        after = f"after a prompt of {ours['prompt_tokens']:.0f} tokens"
        for what, key, form in (
            ("tokens/s", "tokens_per_s", ".1f"),
            ("seconds to the first token", "first_token_s", ".2f"),
            ("processor seconds in all", "cpu_s", ".2f"),
        ):
            times = f"{ours[key] / plain[key]:.2f}×"
            lines.append(f"| {what} {after} | {plain[key]:{form}} | {ours[key]:{form}} | {times} |")
    plain, ours = (report["long"][way]["peak_bytes"] for way in WAYS)
    lines.append(
        f"| peak memory of the process | {plain / 2**20:,.0f} MiB | {ours / 2**20:,.0f} MiB |"
        f" {ours / plain:.2f}× |"
    )
    graph = f"{report['short']['ours']['recorded_tokens']:.0f} tokens of an answer by a CUDA graph."
    same = all(report[name]["same_text"] for name in QUESTIONS)
    return "\n".join([*lines, "", f"Both say the same: {'yes' if same else 'no'}. {report['note'] or graph}"])


def _medians(answers: list[Answered]) -> dict[str, float]:
    fields = [field for field in asdict(answers[0]) if field not in ("text", "note")]
    return {field: statistics.median(getattr(each, field) for each in answers) for field in fields}


def serve(answer: Answer) -> None:
    """Answer each line of stdin."""
    for line in sys.stdin:
        name, tokens = json.loads(line)
        print(json.dumps(asdict(answer(QUESTIONS[name], tokens))), flush=True)


def peak_bytes() -> int:
    """The most memory this process has held: of the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_adapter(recipe: Recipe, folder: Path) -> str:
    """An adapter that changes little."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qlora_tui.adapters.base_weights import model_folder
    from qlora_tui.training.compute_device import find_device
    from qlora_tui.training.model import load_base

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


def by_generate(recipe: Recipe, adapter: str) -> Answer:
    """As a script would: peft's model and ``generate``, streaming."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_tui.adapters.base_weights import model_folder
    from qlora_tui.data.render import prompt_ids
    from qlora_tui.data.tokenizer import ChatTokenizer
    from qlora_tui.training.compute_device import find_device

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
    model.generation_config.eos_token_id = None
    tokenizer = ChatTokenizer.from_folder(folder)

    def answer(question: str, tokens: int) -> Answered:
        ids = torch.tensor([prompt_ids([Message("user", question)], tokenizer)], device=device.torch_device)
        clock = _Clock()
        cpu_began = time.process_time()
        given = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
        # The first is the prompt.
        began, first, *_, last = clock.times_s
        return Answered(
            prompt_tokens=ids.shape[1],
            first_token_s=first - began,
            tokens_per_s=(tokens - 1) / (last - first),
            cpu_s=time.process_time() - cpu_began,
            peak_bytes=peak_bytes(),
            text=tokenizer.backend.decode(given[0, ids.shape[1] :].tolist()),
        )

    return answer


class _Clock:
    """Takes tokens as a streamer does, and notes when."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def by_chat(recipe: Recipe, adapter: str) -> Answer:
    """As this program does."""
    from qlora_tui.chat.session import load_session

    session = load_session(ChatSource(recipe=recipe, adapters={ADAPTER: adapter}))
    session.end_ids = frozenset()

    def answer(question: str, tokens: int) -> Answered:
        # Each question is processed again, though it was asked before. The first token stays, and with it
        # what was recorded, as from turn to turn.
        for prefix_cache in session._caches.values():
            prefix_cache.reuse(prefix_cache.token_ids[:1] * 2)
        cpu_began = time.process_time()
        reply = session.ask(
            [Message("user", question)], adapter_name=ADAPTER, sampling=replace(GREEDY, max_new_tokens=tokens)
        )
        for _ in reply:
            pass
        assert reply.outcome is not None
        return Answered(
            prompt_tokens=reply.outcome.prompt_tokens,
            first_token_s=reply.outcome.first_token_s,
            tokens_per_s=reply.outcome.tokens_per_s,
            cpu_s=time.process_time() - cpu_began,
            peak_bytes=peak_bytes(),
            text=reply.outcome.text,
            recorded_tokens=reply.outcome.recorded_tokens,
            note=session.steps.why_not if session.steps else "",
        )

    return answer


if __name__ == "__main__":
    sys.exit(main())
