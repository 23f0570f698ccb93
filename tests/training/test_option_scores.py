"""Scores of whole answers: all options in one forward, exactly as each by itself."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import functional

from qlora_tui.training import option_scores
from qlora_tui.training.option_scores import PACKED_TOKENS, Choice, Forest, OptionScorer

pytestmark = pytest.mark.slow

END = 2
OPTIONS = ((5, 6, END), (5, 7, END), (5, END), (8, END), (5, 6, 9, END))


def a_model(kind: str) -> Any:
    """A random model that attends to all, within windows of 16, or that carries a state along."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    model: Any
    if kind == "recurrent":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**shared, state_size=8))
    elif kind == "windows":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shared | heads | windows))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **heads))
    return model.eval()


def choices(*lengths: int) -> list[Choice]:
    draw = torch.Generator().manual_seed(1)
    return [
        Choice(tuple(torch.randint(10, 64, (length,), generator=draw).tolist()), OPTIONS)
        for length in lengths
    ]


def by_itself(model: Any, choice: Choice) -> list[float]:
    """The scores of a plain script."""
    scores = []
    for option in choice.options:
        ids = torch.tensor([[*choice.prompt, *option]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(choice.prompt) - 1 : -1]
        scores.append(-float(functional.cross_entropy(logits, ids[0, len(choice.prompt) :], reduction="sum")))
    return scores


@pytest.mark.parametrize(
    ("kind", "packed", "failed"), [("plain", 44, 1 << 62), ("windows", 13, 44), ("recurrent", 0, 7)]
)
def test_packed_scores_are_those_of_each_option_alone(kind: str, packed: int, failed: int) -> None:
    model = a_model(kind)
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    done: list[int] = []
    for rows in (choices(5, 9, 9), choices(40, 3)):
        scores = scorer.score(rows, done.append)
        for choice, found in zip(rows, scores, strict=True):
            assert found == pytest.approx(by_itself(model, choice), abs=1e-3)
    assert (scorer.packed_tokens, scorer.failed_tokens) == (packed, failed)
    assert done[-1] == 2


def test_long_rows_are_in_several_sequences() -> None:
    model = a_model("plain")
    rows = choices(*[PACKED_TOKENS // 3] * 4)
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *call: passes.append(1))
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    scorer.packed_tokens = PACKED_TOKENS
    scores = scorer.score(rows)
    hook.remove()
    assert len(passes) == 2
    assert scores[3] == pytest.approx(by_itself(model, rows[3]), abs=1e-3)


@pytest.mark.parametrize("kind", ["plain", "recurrent"])
def test_the_logits_of_many_options_are_computed_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 places of this vocabulary, which are the fewest that a sequence is padded to."""
    monkeypatch.setattr(option_scores, "_BATCH_LOGITS", 64 * 64)
    model = a_model(kind)
    (row,) = choices(9)
    row = Choice(
        row.prompt, tuple((first, second, END) for first in range(10, 18) for second in range(10, 20))
    )
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, inputs, output: sizes.append(output.logits.numel()))
    done: list[int] = []
    (scores,) = OptionScorer(model, torch.float32, torch.device("cpu")).score([row], done.append)
    hook.remove()
    assert scores == pytest.approx(by_itself(model, row), abs=1e-3)
    assert max(sizes) <= 64 * 64
    assert done == sorted(done) and done[-1] == 1


def test_the_mask_is_bounded_with_any_number_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_scores, "_LONGEST_PACKED", 200)
    monkeypatch.setattr(option_scores, "PACKED_TOKENS", 40)
    model = a_model("plain")
    (row,) = choices(150)
    row = Choice(row.prompt, tuple((first, 10, first, 11, END) for first in range(10, 50)))
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given.get("attention_mask", torch.empty(0)).shape[-1]),
        with_kwargs=True,
    )
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    (scores,) = scorer.score([row])
    hook.remove()
    assert scores == pytest.approx(by_itself(model, row), abs=1e-3)
    assert scorer.packed_tokens == row.tokens and max(lengths) < 200 + 40 + 6 * 5 + 64


@pytest.mark.parametrize(("kind", "compared"), [("plain", 1), ("windows", 8), ("recurrent", 2)])
def test_few_rows_are_compared(kind: str, compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(kind)
    rows = choices(*range(3, 43))
    numbers: list[int] = []
    agrees = OptionScorer._agrees

    def counted(self: OptionScorer, row: Choice) -> bool:
        numbers.append(row.tokens)
        return agrees(self, row)

    monkeypatch.setattr(OptionScorer, "_agrees", counted)
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    # Each row is in a sequence of its own.
    monkeypatch.setattr(option_scores, "PACKED_TOKENS", 1)
    scores = scorer.score(rows)
    assert len(numbers) <= compared
    for number in (0, 10, 39):
        assert scores[number] == pytest.approx(by_itself(model, rows[number]), abs=1e-3)
    scorer.score(rows)
    assert len(numbers) <= compared


def test_a_long_row_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_scores, "_LONGEST_PACKED", 20)
    model = a_model("plain")
    rows = choices(40, 3)
    masks: list[bool] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: masks.append("attention_mask" in given), with_kwargs=True
    )
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    (scores,), _ = scorer.score(rows[:1]), scorer.score(rows[1:])
    hook.remove()
    assert not masks[0] and masks[-1]
    assert scores == pytest.approx(by_itself(model, rows[0]), abs=1e-3)


def _sees_everything(self: Forest) -> torch.Tensor:
    return torch.ones(len(self.tokens), len(self.tokens)).tril().bool()


def _counts_on(forest: Forest) -> Forest:
    forest.positions = list(range(len(forest.tokens)))
    return forest


def test_options_that_see_each_other_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model("plain")
    (row,) = choices(9)
    monkeypatch.setattr(Forest, "attends", _sees_everything)
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    assert scorer.score([row])[0] == pytest.approx(by_itself(model, row), abs=1e-3)
    assert scorer.failed_tokens == row.tokens


def test_wrong_positions_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model("plain")
    (row,) = choices(9)
    of = Forest.of
    monkeypatch.setattr(Forest, "of", lambda rows: _counts_on(of(rows)))
    scorer = OptionScorer(model, torch.float32, torch.device("cpu"))
    assert scorer.score([row])[0] == pytest.approx(by_itself(model, row), abs=1e-3)
    assert scorer.failed_tokens == row.tokens


def test_the_first_token_alone_does_not_decide() -> None:
    """``5`` begins three options: their first token is likelier than any of them."""
    model = a_model("plain")
    (row,) = choices(6)
    scores = OptionScorer(model, torch.float32, torch.device("cpu")).score([row])[0]
    first = torch.tensor([by_itself(model, Choice(row.prompt, ((option[0],),)))[0] for option in OPTIONS])
    assert not torch.allclose(torch.tensor(scores).softmax(0), first.softmax(0), atol=1e-2)
    assert sum(torch.tensor(scores).exp()) < 1
