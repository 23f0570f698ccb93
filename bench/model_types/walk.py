"""Tests one model type: it is trained, resumed, merged and queried, each compared with the libraries.

The model is a tiny random one in float32, so that two ways of computing agree to rounding. A run takes a few
steps on packed conversations that are longer than the windows and chunks of the model. It is compared with a
plain loop over transformers and peft on the same samples, and with its resumed copy.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from bench.model_types.outcome import Walked
from bench.model_types.tiny_config import settings_of
from qlora_tui.adapters.base_weights import SHARED_WEIGHT
from qlora_tui.catalog.config_parser import load_config
from qlora_tui.errors import UserError, first_line
from qlora_tui.recipe.schema import Data, Lora, Model, Quantization, Recipe, Source
from qlora_tui.recipe.training_settings import Training

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = re.findall(
    r"\w+",
    "the quick brown fox jumps over lazy dog wise old owl sat in an oak and said little colour of red blue "
    "green what who where how many is are answer question here there river stone light early late",
)
_ROWS, _STEPS = 12, 4
_LEARNING_RATE = 2e-3
_ANSWER_TOKENS, _TURNS = 12, 2
_READ_TOKENS = 40
"""Tokens of a prompt that the chat reads at once. A prompt has more."""
_ROUNDING = 1e-4
"""Largest allowed difference of a loss from the plain loop, and of a gradient norm relative to it.

Of 213 types, 210 differ by less than 2e-5 in each step.
"""
_PERTURBATION, _DRAWS, _SENSITIVE = 2e-7, 16, 10
"""Relative rounding of the base's weights, number of draws, and factor by which a difference may exceed
the effect of this rounding on the plain loop. A token that rounding sends to another expert affects all
later steps."""


class WalkError(Exception):
    """A result differs from the libraries' result."""


def walk(model_type: str, folder: Path, method: Literal["none", "nf4"] = "none") -> Walked:
    """Train, resume, merge and query a tiny model of a type; write everything below ``folder``."""
    walked = Walked(model_type=model_type, verdict="wrong")
    stage = "config"
    try:
        model_folder = folder / "model"
        write_model(model_type, model_folder, walked)
        stage = "run"
        run = _train(recipe_for(model_folder, method), walked)
        if method == "none":
            stage = "plain loop"
            _compare_with_plain_loop(run, model_folder, walked)
        stage = "resume"
        _compare_resumed(run)
        stage = "chat"
        _compare_answers(run, model_folder, walked, compared=method == "none")
        stage = "merge"
        _merge(run, folder / "merged", walked)
        walked.verdict = "trained"
    except UserError as refusal:
        walked.verdict = "refused" if stage in ("config", "run") else "wrong"
        walked.reason = f"{refusal.title}: {refusal.what}"
        if walked.verdict == "wrong":
            walked.reason = f"{stage}: {walked.reason}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = "" if isinstance(error, WalkError) else f" ({Path(where.filename).name}:{where.lineno})"
        walked.reason = f"{stage}: {type(error).__name__}: {first_line(error)[:300]}{at}"
        if os.environ.get("WALK_TRACEBACK"):
            traceback.print_exc()
    return walked


def write_model(model_type: str, folder: Path, walked: Walked) -> None:
    """Write a random model with its tokenizer. Raises UserError if transformers builds none.

    A multimodal type is written as a whole, as it is published, even if the trained part has its own class.
    """
    import transformers
    from transformers import AutoConfig

    from qlora_tui.training.model_class import auto_class, build_on_meta
    from qlora_tui.training.selftest import write_tokenizer

    tokenizer = write_tokenizer(folder, [" ".join(_WORDS)], _TEMPLATE, vocab_size=320)
    config = AutoConfig.for_model(model_type, **settings_of(model_type))
    own_loader = auto_class(config)
    for each in (config, config.get_text_config()):
        each.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        each.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    loader: Any = transformers.AutoModelForImageTextToText
    if type(config) not in loader._model_mapping:
        loader = own_loader
    torch.manual_seed(0)
    try:
        model = loader.from_config(config).float()
    except ImportError:
        build_on_meta(config.to_dict())
        raise
    _make_uneven(model)
    model.save_pretrained(folder)
    walked.model_class = type(build_on_meta(load_config(folder / "config.json"))).__name__


@torch.no_grad()
def _make_uneven(model: nn.Module) -> None:
    """Add noise to norms, biases and gates with a constant initialization, which would hide a mistake."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and parameter.std() < 1e-4:
            parameter.add_(0.1 * torch.randn_like(parameter))


def recipe_for(model: Path, method: Literal["none", "nf4"]) -> Recipe:
    """Return the recipe of a short run on packed conversations, which are written next to the model."""
    rows = random.Random(0)
    path = model.parent / "rows.jsonl"

    def text(least: int, most: int) -> str:
        return " ".join(rows.choices(_WORDS, k=rows.randint(least, most)))

    with path.open("w") as lines:
        for _ in range(_ROWS):
            turns = [("user", text(8, 30)), ("assistant", text(8, 40))]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return Recipe(
        model=Model(id=str(model)),
        quantization=Quantization(method=method, compute_dtype="float32"),
        lora=Lora(rank=4, alpha=8, dropout=0.0),
        data=Data(sources=(Source(path=str(path)),), validation_fraction=0.0, max_length=256),
        training=Training(
            micro_batch_size=1,
            gradient_accumulation=1,
            max_steps=_STEPS,
            learning_rate=_LEARNING_RATE,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            optimizer="adamw",
            checkpoint_every=_STEPS // 2,
            general_prompts=0,
            task_prompts=0,
            seed=1,
        ),
    )


def _train(recipe: Recipe, walked: Walked) -> Any:
    """Train, and record what was used. Raises UserError if the run was refused."""
    from qlora_tui.runs.directory import create_run
    from qlora_tui.runs.event_log import EventTail
    from qlora_tui.runs.events import Environment, Failed, Finished, StepVerified

    run = create_run(recipe)
    _run(run)
    for event in EventTail(run.events_path).drain():
        match event:
            case Environment():
                walked.attention, walked.loss = event.attention, event.loss
            case StepVerified():
                walked.replaced = event.replaced
                if not event.agrees:
                    raise WalkError(
                        f"first step: {event.reason or event.tensor}, {event.gradient_difference}"
                    )
            case Failed(kind="bug"):
                raise WalkError(f"{event.title}: {event.what}")
            case Failed():
                raise event.problem()
            case Finished():
                return run
    raise WalkError("the run has no end")


def _run(run: Any) -> None:
    from qlora_tui.runs.memory_retry import RetryPlan
    from qlora_tui.training.supervisor import run_trainer

    run_trainer(run, RetryPlan())


def _compare_with_plain_loop(run: Any, model_folder: Path, walked: Walked) -> None:
    """Compare losses and gradient norms of a run with those of a loop over transformers and peft."""
    from qlora_tui.runs.event_log import EventTail
    from qlora_tui.runs.events import Step

    steps = [event for event in EventTail(run.events_path).drain() if isinstance(event, Step)]
    ours = [(step.loss or 0.0, step.grad_norm or 0.0) for step in steps]
    plain = list(_plain_steps(run, model_folder))
    walked.largest_difference = _largest_difference(ours, plain)
    if walked.largest_difference <= _ROUNDING:
        return
    perturbed = (list(_plain_steps(run, model_folder, seed)) for seed in range(1, _DRAWS + 1))
    if not any(walked.largest_difference <= _SENSITIVE * _largest_difference(p, plain) for p in perturbed):
        raise WalkError(f"losses and gradient norms {ours}, not {plain}")


def _largest_difference(steps: list[tuple[float, float]], plain: list[tuple[float, float]]) -> float:
    """Return the largest difference of losses, and of gradient norms relative to ``plain``; or NaN."""
    return max(
        max(abs(loss - other), abs(norm - other_norm) / max(other_norm, 1e-6))
        for (loss, norm), (other, other_norm) in zip(steps, plain, strict=True)
    )


def _plain_steps(run: Any, model_folder: Path, seed: int = 0) -> Iterator[tuple[float, float]]:
    """Yield loss and gradient norm of each step, by sample; with ``seed``, from perturbed weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from qlora_tui.training.adapter import exact_target_names
    from qlora_tui.training.checks.base import prepare_for_text
    from qlora_tui.training.clean_files import adapter_view

    recipe = run.recipe()
    model = _plain_model(model_folder)
    if seed:
        _perturb(model, seed)
    set_seed(recipe.training.seed)
    with adapter_view(run.adapter_dir) as view:
        config = LoraConfig.from_pretrained(str(view))
    config.inference_mode = False
    prepare_for_text(model, torch.device("cpu"))
    with exact_target_names(model, config.target_modules or ()):
        adapted = get_peft_model(model, config).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=recipe.training.weight_decay)
    for samples in _samples_of_steps(run):
        count = sum(int((labels[1:] != -100).sum()) for _, labels in samples)
        total = 0.0
        for ids, labels in samples:
            logits = adapted(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), labels[1:], reduction="sum") / count
            torch.autograd.backward(loss)
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.training.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        yield total, norm


@torch.no_grad()
def _perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + _PERTURBATION * torch.randn(parameter.shape, generator=generator))


def _samples_of_steps(run: Any) -> list[list[tuple[Tensor, Tensor]]]:
    """Return token ids and labels of the samples of each step."""
    from qlora_tui.data.dataset import prepare_dataset
    from qlora_tui.data.step_plan import plan_steps
    from qlora_tui.data.tokenizer import ChatTokenizer
    from qlora_tui.training import checkpoints

    recipe = run.recipe()
    newest, _ = checkpoints.latest(run)
    assert newest is not None
    train = prepare_dataset(recipe, ChatTokenizer.from_folder(Path(recipe.model.id))).train
    steps = plan_steps(train, recipe, padding_free=newest.state.padding_free).steps

    def sample(i: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(list(train.token_ids(i)))
        return ids, ids.masked_fill(torch.tensor(list(train.loss_mask(i))) == 0, -100)

    return [[sample(i) for sequence in step.sequences for i in sequence] for step in steps]


def _plain_model(folder: Path) -> Any:
    """Return the whole model as transformers loads it, in float32 and with its default attention."""
    from transformers import AutoConfig

    from qlora_tui.training.model_class import auto_class

    loader = auto_class(AutoConfig.from_pretrained(str(folder)))
    return loader.from_pretrained(str(folder), dtype=torch.float32)


def _compare_resumed(run: Any) -> None:
    """Compare the adapter of a run with that of its copy, resumed from the first checkpoint."""
    from qlora_tui.runs.directory import RunDir

    copy = RunDir(run.path.with_name(f"{run.path.name}-resumed"))
    shutil.copytree(run.path, copy.path)
    shutil.rmtree(copy.adapter_dir)
    for step, folder in copy.checkpoints():
        if step > _STEPS // 2:
            shutil.rmtree(folder)
    _run(copy)
    weights = "adapter_model.safetensors"
    if not (copy.adapter_dir / weights).is_file():
        raise WalkError("the resumed run wrote no adapter")
    if (copy.adapter_dir / weights).read_bytes() != (run.adapter_dir / weights).read_bytes():
        raise WalkError("the resumed run trained another adapter")


def _compare_answers(run: Any, model_folder: Path, walked: Walked, *, compared: bool) -> None:
    """Compare greedy answers of a chat, with and without the adapter, with those of transformers and peft.

    The second question extends the first, so that the cache of a conversation is compared too. If
    transformers answers differently with and without its cache, either answer is right. With ``compared``
    False, only asks, because the libraries' model is not quantized.
    """
    from qlora_tui.chat import generation
    from qlora_tui.chat.chat_sources import run_source
    from qlora_tui.chat.chat_types import GREEDY
    from qlora_tui.chat.loading import load_session
    from qlora_tui.data.conversation import Message

    vars(generation)["PREFILL_CHUNK_TOKENS"] = _READ_TOKENS
    session = load_session(run_source(run))
    session.end_ids = frozenset()
    question = session.prompt([Message("user", " ".join(_WORDS[:24]))])
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=_ANSWER_TOKENS)
    plain = _plain_model(model_folder).eval()
    for name in ("base", "adapter"):
        if name == "adapter":
            plain = _with_adapter(plain, run.adapter_dir)
        session.ensure_loaded(name)
        session.check(name, question)
        cache, prompt = session.new_cache(), question
        for _ in range(_TURNS):
            alone = _greedy(plain, prompt, _ANSWER_TOKENS)
            cached = _generated(plain, prompt, _ANSWER_TOKENS)
            if cached and cached != alone:
                # The selection among equal scores may depend on the tokens of a pass, so read like
                # ``generate``.
                session.reads_in_parts = False
                walked.chat = "as transformers with a cache, not as without one"
            splitter = session.splitter(prompt)
            reply = generation.AnswerStream(session, name, prompt, cache, sampling, Event(), splitter)
            for _ in reply:
                pass
            ours = cache.token_ids[len(prompt) :]
            if compared and ours not in (cached[: len(ours)], alone[: len(ours)]):
                raise WalkError(f"{name} answers {ours}, not {cached} or {alone}")
            prompt = [*cache.token_ids, *question[-_READ_TOKENS:]]
    if session.warning and session.keeps_keys:
        raise WalkError(session.warning)
    if not session.keeps_keys:
        walked.chat = "without a cache"


def _generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the greedy answer of transformers' ``generate``, which uses a cache; empty if it raises."""
    ids = torch.tensor([prompt])
    try:
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
        )
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return []
    return [int(token) for token in answer[0, len(prompt) :]]


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return the most likely tokens after a prompt, each computed from the whole text before it."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        likely = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, likely], dim=1)
    return [int(token) for token in tokens[0, len(prompt) :]]


def _with_adapter(plain: Any, adapter: Path) -> Any:
    """Return the model with the adapter, loaded by peft without changing the names of its targets."""
    from peft import PeftConfig, PeftModel

    from qlora_tui.training.adapter import exact_target_names
    from qlora_tui.training.clean_files import adapter_view

    with adapter_view(adapter) as view:
        targets = PeftConfig.from_pretrained(str(view)).target_modules or ()
        with exact_target_names(plain, targets):
            return PeftModel.from_pretrained(plain, str(view)).eval()


def _merge(run: Any, folder: Path, walked: Walked) -> None:
    """Merge the adapter, which compares the logits of the result. Raises WalkError if it was not merged."""
    from qlora_tui.chat.chat_sources import run_source
    from qlora_tui.export.merge import merge

    try:
        result = merge(run_source(run), "adapter", folder)
    except UserError as refusal:
        if refusal.code != SHARED_WEIGHT:
            raise
        walked.merge = "its layers share weights"
        return
    if result.check is None:
        raise WalkError(f"not compared: {result.unchecked_because}")
