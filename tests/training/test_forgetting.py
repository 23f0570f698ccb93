"""The divergence from the base on general prompts: its answers, their cache, and what a run reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, GeneralAnswers, PhaseChanged
from qlora_tui.runs.view import RunView
from qlora_tui.training import forgetting, packed_attention
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.batches import RowShape
from qlora_tui.training.forgetting import (
    BaseAnswer,
    GeneralAnswer,
    compare_with_base,
    count_answers,
    divergence_of_top,
    holds_json,
    is_refusal,
)
from qlora_tui.training.health import ForgettingMonitor, check_general_answers
from qlora_tui.training.loop import RunProgress
from qlora_tui.training.loss import use_loss
from qlora_tui.training.scoring import answer_logits
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of

pytestmark = pytest.mark.slow

PROMPTS = ("what is red", "who sat in an oak and said little, and how many are lazy", "the fox")
CPU = torch.device("cpu")
ALONE = RowShape(packed=False, max_length=128)
PACKED = RowShape(packed=True, max_length=128, multiple=32)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tiny_model)


def prompt_ids_of(tokenizer: ChatTokenizer, *prompts: str) -> tuple[tuple[int, ...], ...]:
    return tuple(forgetting.prompt_tokens(prompts, tokenizer, "auto").values())


def answers_to(base: Any, tokenizer: ChatTokenizer, *prompts: str) -> tuple[BaseAnswer, ...]:
    ids = prompt_ids_of(tokenizer, *prompts)
    return forgetting.compute(base, ids, tokenizer, ALONE, CPU, lambda done, total: None)


def test_prompts_answered_together_are_answered_as_alone(base: Any, tokenizer: ChatTokenizer) -> None:
    together = answers_to(base, tokenizer, *PROMPTS)
    alone = [answers_to(base, tokenizer, prompt)[0] for prompt in PROMPTS]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    for answer in together:
        greedy = base(torch.tensor([answer.ids])).logits[0, list(answer.places)]
        assert greedy.argmax(-1).tolist() == list(answer.ids[answer.prompt_tokens :])
        assert answer.top_ids[:, 0].tolist() == list(answer.ids[answer.prompt_tokens :])


def test_the_divergence_is_nearly_and_never_above_the_exact_one() -> None:
    torch.manual_seed(1)
    logits = 4 * torch.randn(40, 4096)  # about as peaked as a trained model's
    top = logits.log_softmax(-1).topk(forgetting.TOP_TOKENS)
    answer = BaseAnswer((0,) * 41, 1, top.indices.to(torch.int32), top.values)
    assert divergence_of_top(logits, answer).abs().max() < 1e-5
    moved = logits + torch.randn_like(logits)
    expected, actual = logits.log_softmax(-1), moved.log_softmax(-1)
    exact = (expected.exp() * (expected - actual)).sum(-1)
    lower = divergence_of_top(moved, answer)
    assert (lower <= exact + 1e-5).all() and lower.sum() > 0.9 * exact.sum()


def test_a_changed_model_diverges_and_loses_turn_ends(base: Any, tokenizer: ChatTokenizer) -> None:
    answers = answers_to(base, tokenizer, *PROMPTS)
    # The base's own last tokens stand for turn ends: a random model ends no turn.
    ends = frozenset(answer.ids[-1] for answer in answers)
    same = compare_with_base(base, answers, ends, ALONE, CPU)
    assert same.divergence < 1e-3 and same.turns == same.turns_ended == len(PROMPTS)
    assert same.places == sum(len(answer.places) for answer in answers)
    head = base.get_output_embeddings().weight.data
    before = head.clone()
    head += torch.randn_like(head)
    changed = compare_with_base(base, answers, ends, ALONE, CPU)
    head.copy_(before)
    assert changed.divergence / changed.places > 0.5 and changed.turns_ended < len(PROMPTS)


def test_answers_in_one_row_have_the_logits_of_each(
    tiny_model: Path, base: Any, tokenizer: ChatTokenizer
) -> None:
    from transformers import AutoModelForCausalLM

    packed_attention.register()
    packing = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=packed_attention.NAMES["segments"]
    )
    use_loss(packing, "the library's")
    answers = answers_to(base, tokenizer, *PROMPTS)
    with torch.no_grad():
        alone = dict(answer_logits(base, answers, ALONE, CPU))
        packed = dict(answer_logits(packing, answers, PACKED, CPU))
    assert packed.keys() == alone.keys() == {0, 1, 2}
    for number, logits in alone.items():
        torch.testing.assert_close(packed[number], logits, rtol=1e-4, atol=1e-4)


def test_the_head_reads_contiguous_states_of_a_prompt_batch(base: Any, tokenizer: ChatTokenizer) -> None:
    seen = []
    hook = base.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].is_contiguous())
    )
    answer_greedily(base, prompt_ids_of(tokenizer, *PROMPTS), tokenizer, CPU)
    hook.remove()
    assert len(seen) > 1 and all(seen)


def test_answers_have_no_penalty_of_the_generation_config(base: Any, tokenizer: ChatTokenizer) -> None:
    prompts = prompt_ids_of(tokenizer, *PROMPTS)
    plain = answer_greedily(base, prompts, tokenizer, CPU)
    settings = base.generation_config
    before = settings.repetition_penalty, settings.no_repeat_ngram_size
    settings.repetition_penalty, settings.no_repeat_ngram_size = 20.0, 1
    try:
        assert answer_greedily(base, prompts, tokenizer, CPU) == plain
    finally:
        settings.repetition_penalty, settings.no_repeat_ngram_size = before


def test_answers_are_read_back_and_damaged_files_ignored(
    base: Any, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    prompts = prompt_ids_of(tokenizer, *PROMPTS)
    answers = answers_to(base, tokenizer, *PROMPTS)
    file = tmp_path / "answers.safetensors"
    assert forgetting.read(file, prompts) is None
    forgetting.write(file, answers)
    again = forgetting.read(file, prompts)
    assert again is not None and [answer.ids for answer in again] == [answer.ids for answer in answers]
    assert all(torch.equal(a.top_ids, b.top_ids) for a, b in zip(again, answers, strict=True))
    file.write_bytes(file.read_bytes()[:-7])
    assert forgetting.read(file, prompts) is None


def test_a_run_reports_what_it_forgets_and_caches_the_answers(recipe: MakeRecipe, trainers: Trainers) -> None:
    def run(**settings: Any) -> RunDir:
        learning = {"training.learning_rate": 5e-2, "training.epochs": 2.0}
        run = create_run(recipe({**learning, "training.general_prompts": 4, **settings}))
        assert trainers.run(run) == 0
        return run

    first, again = run(), run()
    curve = [event.forgetting for event in events_of(first, Evaluated)]
    assert curve[0] == 0.0
    assert curve[-1] is not None and curve[-1] > 0.1
    view = RunView(first)
    view.refresh()
    assert view.forgetting == curve[-1]
    assert view.general_answers is not None and view.general_answers.answers == 4
    assert [event.general_answers is None for event in events_of(first, Evaluated)][-2:] == [True, False]

    def answered(run: RunDir) -> int:
        return sum("base's answers" in event.detail for event in events_of(run, PhaseChanged))

    assert (answered(first), answered(again)) == (1, 0)
    assert [event.forgetting for event in events_of(again, Evaluated)] == curve


def test_forgetting_counts_for_the_best_checkpoint() -> None:
    progress = RunProgress()
    losses = {0: (2.0, 0.0), 10: (1.0, 0.1), 20: (0.8, 0.9), 30: (0.95, 0.1)}
    weight = 0.5
    best = [
        step for step, (loss, far) in losses.items() if progress.add_score(step, loss + weight * far, loss)
    ]
    assert best == [10, 30] and progress.best_step == 30 and progress.loss_before_training == 2.0


def test_forgetting_is_reported_once_and_not_before_training() -> None:
    monitor = ForgettingMonitor()
    assert monitor.check(0, 3.0, None) is None
    assert monitor.check(10, 1.2, 1.0) is None
    finding = monitor.check(20, 2.4, 0.25)
    assert finding is not None and finding.evidence.startswith(
        "Only 25% of general answers still end. Forgetting 2.4 of 2"
    )
    assert monitor.check(30, 2.9, 0.2) is None


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ('{"name": "Ana", "age": 31}', True),
        ('Here it is:\n```json\n["a", "b"]\n```', True),
        ('{"name": "Ana", "age": 3', False),
        ("{'name': 'Ana'}", False),
        ("Keeper's log: Ana is 31.", False),
        ("]{", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_found_in_an_answer(text: str, holds: bool) -> None:
    assert holds_json(text) is holds


def test_a_refusal_is_one_at_the_beginning_only() -> None:
    assert is_refusal("I’m sorry, but I can't help with that.")
    assert is_refusal("As an AI language model, I have no house.")
    assert not is_refusal("A lock opens with a pick. " * 5 + "I cannot say more.")


def test_answers_are_counted_by_each_rule() -> None:
    loop = "The light turns over the sea. " * 6
    counts = count_answers(
        [
            GeneralAnswer("Name a river.", "The Tagus.", ended=True),
            GeneralAnswer("Name a sea.", loop, ended=False),
            GeneralAnswer("Open a lock.", "I cannot help with that.", ended=True),
            GeneralAnswer("Give JSON.", '{"a": 1}', ended=True),
            GeneralAnswer("Give a JSON array.", "a, b", ended=True),
        ]
    )
    assert counts == (5, 4, 1, 1, 2, 1)


def test_answers_that_got_worse_are_a_finding() -> None:
    def counts(ended: int, looping: int, json_valid: int) -> GeneralAnswers:
        return GeneralAnswers(
            answers=12,
            ended=ended,
            base_ended=10,
            looping=looping,
            base_looping=1,
            refused=1,
            base_refused=1,
            json_prompts=3,
            json_valid=json_valid,
            base_json_valid=3,
        )

    assert check_general_answers(counts(8, 3, 2)) is None
    finding = check_general_answers(counts(7, 1, 1))
    assert finding is not None
    assert "7 end their turn (the base: 10)" in finding.evidence
    assert "1 of the 3 answers that should be JSON are valid (the base: 3)" in finding.evidence
    assert "loop" not in finding.evidence
