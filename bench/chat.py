"""Speed and memory of the chat, compared with plain ``generate`` with the same adapter unmerged.

    python -m bench.chat MODEL [--adapter FOLDER] [--tokens 48] [--rounds 7] [--json]

Both use the same NF4 base, each in a separate process. Without --adapter, a random LoRA of rank 16 on all
linear modules is created. They answer in turns whose order is reversed every round, so that a busy machine
slows down both: a short question, and one of about 600 tokens. Medians are reported. CPU time is the figure
that other load on the machine disturbs least (with OMP_NUM_THREADS=1; otherwise it includes waiting threads).
Plain ``generate`` does not look for the end of its turn, and its threads wait for each other like ours.

On a GPU, the table says how many tokens a CUDA graph computed, or why it computed none.
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
    """One answer. Tokens after the first count for its speed."""

    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float
    cpu_s: float
    """CPU time of the whole answer."""
    peak_bytes: int
    """Peak memory of the process so far, including libraries."""
    text: str
    recorded_tokens: int = 0
    """Number of tokens that a CUDA graph computed."""
    note: str = ""
    """Why a CUDA graph computed none."""


Answer = Callable[[str, int], Answered]
"""Answers a question in a given number of tokens."""


def main() -> int:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        # For both processes: on a busy machine, spinning threads would make plain ``generate`` many times
        # slower.
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
    """Return the answers by method and length of the question, after one warm-up."""
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
    """Return medians by length of the question and method, and whether both gave the same answers."""
    report: dict[str, Any] = {}
    for name in QUESTIONS:
        report[name] = {way: _medians(answers[way][name]) for way in answers}
        report[name]["same_text"] = len({each.text for way in WAYS for each in answers[way][name]}) == 1
        report[name]["ratio"] = report[name]["ours"]["tokens_per_s"] / report[name]["plain"]["tokens_per_s"]
    report["note"] = next((each.note for each in answers["ours"]["short"] if each.note), "")
    return report


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table."""
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
    """Return the peak memory of this process, on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_adapter(recipe: Recipe, folder: Path) -> str:
    """Create a random adapter with small changes, and return its folder."""
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
    """Return a function that answers with peft's model and ``generate``, streaming, like a typical script."""
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
    # Our own loading would prevent the 4-bit layout with which CPUs answer fastest.
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
        # The first time belongs to the prompt.
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
    """Receives tokens as a streamer, and records their times."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: object) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


def by_chat(recipe: Recipe, adapter: str) -> Answer:
    """Return a function that answers with this program's chat."""
    from qlora_tui.chat.loading import load_session

    session = load_session(ChatSource(recipe=recipe, adapters={ADAPTER: adapter}))
    session.end_ids = frozenset()

    def answer(question: str, tokens: int) -> Answered:
        # Process each question again, even if it was asked before. The first token stays in the cache, with
        # the recorded steps, as between turns.
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
