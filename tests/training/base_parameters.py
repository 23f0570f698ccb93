"""Checks of adapters that train parameters of the base too: rows of tokens, or embedding and head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training import chunked_loss, head_chunks
from qlora_tui.training.adapter import load_adapter, save_adapter
from tests.training.test_numerics import labeled

Trained = Callable[[Any], Iterable[Tensor]]
"""The parameters of the base that a model trains."""


def saved_logits(
    base: Any, adapt: Callable[[Any], Any], trained: Trained, folder: Path
) -> tuple[Any, Tensor, Tensor]:
    """The model, its logits (1, tokens, vocabulary), and those of plain peft on what was saved of it.

    The base's own logits do not change, and the model reads back what it saved.
    """
    from peft import PeftModel

    plain = copy.deepcopy(base)
    model = adapt(base).eval()
    for parameter in trained(model):
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 40, 7, 9, 251, 40]])
    with torch.no_grad():
        ours = model(ids).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    save_adapter(model, folder)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.zero_()
        load_adapter(model, folder)
        torch.testing.assert_close(model(ids).logits, ours)
        theirs: Any = PeftModel.from_pretrained(plain, str(folder))
        return model, ours, theirs.eval()(ids).logits


def gradients_of_nothing(base: Any, adapt: Callable[[Any], Any], trained: Trained) -> list[Tensor | None]:
    """The gradients of the trained parameters after a batch without a token in the loss."""
    head = chunked_loss.find_head(base)
    assert isinstance(head, head_chunks.ChunkedHead)
    model = adapt(base)
    chunked_loss.use_chunked_loss(base, head)
    ids, labels = labeled(base)
    nothing = torch.full_like(labels, chunked_loss.IGNORED)
    model.train()(input_ids=ids, labels=nothing, num_items_in_batch=1).loss.backward()
    return [parameter.grad for parameter in trained(model)]
