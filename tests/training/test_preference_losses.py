"""The formulas of preference methods, on numbers worked out by hand, and the loss of single tokens."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_tui.training import chunked_loss, head_chunks
from qlora_tui.training.head_chunks import ChunkedHead
from qlora_tui.training.preferences import logistic_loss, odds_ratio_loss, prospect_loss
from qlora_tui.training.token_losses import token_losses

pytestmark = pytest.mark.slow


def test_the_odds_ratio_is_that_of_the_probabilities() -> None:
    chosen, rejected = torch.tensor([math.log(0.8), math.log(0.01)]), torch.tensor([math.log(0.5)] * 2)
    odds = torch.tensor([0.8 / 0.2, 0.01 / 0.99])
    expected = -0.1 * torch.log(odds / (1 + odds))
    assert torch.allclose(odds_ratio_loss(chosen, rejected, 0.1), expected)


def test_a_certain_answer_has_a_finite_gradient() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    torch.autograd.backward(odds_ratio_loss(chosen, torch.tensor([-1.0]), 0.1).sum())
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()


def test_equal_rewards_cost_a_coin_flip() -> None:
    same = torch.tensor([0.3])
    assert float(logistic_loss(same, same)) == pytest.approx(math.log(2))
    assert float(logistic_loss(same + 1, same, 1.0)) == pytest.approx(math.log(2))


def test_kto_wants_good_answers_above_and_bad_ones_below() -> None:
    rewards, moved = torch.tensor([0.5, 0.5, 0.1]), torch.tensor(0.1)
    losses = prospect_loss(rewards, torch.tensor([True, False, True]), moved)
    assert losses.tolist() == pytest.approx([1 / (1 + math.exp(0.4)), 1 / (1 + math.exp(-0.4)), 0.5])


@pytest.mark.parametrize("rows", [(), (3, 17)])
def test_token_losses_weighted_afterwards_equal_the_summed_loss(
    rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "block_rows", lambda device: 3)
    torch.manual_seed(0)
    projection = torch.nn.Linear(16, 40, bias=True).requires_grad_(False)
    head = ChunkedHead(projection, 0.7, 5.0)
    targets, weights = torch.randint(40, (300,)), torch.rand(300)
    ids = torch.tensor(rows) if rows else None
    results = []
    for by_token in (True, False):
        torch.manual_seed(1)
        states = torch.randn(300, 16, requires_grad=True)
        values = torch.randn(len(rows), 16, requires_grad=True) if rows else None
        if by_token:
            loss = (token_losses(states, targets, head, ids, values) * weights).sum()
        else:
            loss = chunked_loss.chunked_sum(states, targets, head, weights, ids, values)
        torch.autograd.backward(loss)
        results.append((loss.detach(), states.grad, None if values is None else values.grad))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None and expected is None) or torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
