"""Trained rows of embedding and head for tokens that a base model never learned: exact, saved and useful."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import GREEDY
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora, Source
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.training import chunked_loss, head_chunks
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.evaluation import argmax_tokens
from qlora_tui.training.forgetting.base_divergence import equals_base
from qlora_tui.training.model_loading import checkpoint_activations
from tests.support.trainer_processes import Trainers
from tests.training.base_parameters import gradients_of_nothing, saved_logits
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import losses
from tests.training.families import build, with_adapter
from tests.training.test_numerics import close, labeled
from tests.training.test_resume import EXACT, interrupted_at
from tests.training.tiny_model import make_tiny_model
from tests.tui.sample_data import write_rows

pytestmark = pytest.mark.slow

IDS = [40, 7, 251]
"""The first has no row to speak of."""
END = "<|im_end|>"


def faint(model_type: str, *, tied: bool) -> Any:
    """A model that never learned the first of the tokens."""
    model = build(model_type, tie_word_embeddings=tied)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        matrix[IDS[0]] = 0
    return model


def adapted(model: Any) -> Any:
    return with_adapter(model, IDS)


def row_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if "trainable_tokens_delta" in name)


def trained_rows(model: Any) -> list[Tensor]:
    return [rows for _, rows in row_parameters(model)]


def by_hand(model: Any, ids: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    """The loss with the rows put into whole matrices, merged with LoRA by peft; those rows' gradients."""
    plain = model.merge_and_unload()
    matrices = {id(w): w for w in (plain.get_input_embeddings().weight, plain.get_output_embeddings().weight)}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    value = plain(input_ids=ids, labels=labels).loss
    value.backward()
    return value.item(), [matrix.grad[IDS] for matrix in matrices.values()]


@pytest.mark.parametrize(
    ("model_type", "tied", "chunked", "checkpointing"),
    [
        ("llama", True, True, False),
        ("llama", True, True, True),
        ("llama", True, False, False),
        ("llama", False, True, False),
        ("llama", False, True, True),
        ("llama", False, False, True),
        ("gemma3_text", True, True, False),
        ("gemma2", False, True, True),
    ],
)
def test_gradients_are_those_of_whole_matrices(
    model_type: str, tied: bool, chunked: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(head_chunks, "block_rows", lambda device: 3)
    base = faint(model_type, tied=tied)
    ids, labels = labeled(base)
    ids[:, ::3], labels[:, 2::5] = IDS[0], IDS[1]
    head = chunked_loss.find_head(base)
    assert isinstance(head, head_chunks.ChunkedHead)
    model = adapted(base)
    expected, gradients = by_hand(copy.deepcopy(model), ids, labels)
    if chunked:
        chunked_loss.use_chunked_loss(base, head)
    if checkpointing:
        checkpoint_activations(base)
    value = model.train()(input_ids=ids, labels=labels).loss
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    rows = [parameter for _, parameter in row_parameters(model)]
    assert len(rows) == (1 if tied else 2)
    for row, gradient in zip(rows, gradients, strict=True):
        assert row.dtype == torch.float32 and close(row.grad, gradient)


def test_only_rows_near_zero_are_initialized_to_the_mean() -> None:
    base = faint("llama", tied=False)
    before = [m.weight.clone() for m in (base.get_input_embeddings(), base.get_output_embeddings())]
    for (_, rows), matrix in zip(row_parameters(adapted(base)), before, strict=True):
        assert torch.allclose(rows[0], matrix.mean(0), atol=1e-6)
        assert torch.equal(rows[1:], matrix[IDS[1:]])


@pytest.mark.parametrize("ids", [IDS, IDS[1:]])
def test_a_row_set_to_the_mean_is_a_change_of_the_base(ids: list[int]) -> None:
    base = faint("llama", tied=False)
    model = add_lora(base, Lora(rank=4), parse_architecture(base.config.to_dict()), ids)
    assert equals_base(model) == (IDS[0] not in ids)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gemma3_text", True)])
def test_plain_peft_reads_what_is_saved_and_says_the_same(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    _, ours, theirs = saved_logits(faint(model_type, tied=tied), adapted, trained_rows, tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_nothing_to_learn_leaves_every_row_a_gradient_of_zero() -> None:
    """Processes that train together wait for the gradient of each parameter."""
    gradients = gradients_of_nothing(faint("llama", tied=False), adapted, trained_rows)
    assert gradients and all(grad is not None and not grad.any() for grad in gradients)


def test_finding_short_rows_does_not_copy_the_head() -> None:
    """peft copies it at each access to the head's ``weight``, for which a GPU may lack the memory."""

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
        shapes: ClassVar[set[torch.Size]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != weight.data_ptr():
                self.shapes.add(out.shape)
            return out

    base = faint("llama", tied=False)
    model = adapted(base).eval()
    head = base.get_output_embeddings()
    weight = head.original_module.weight
    hidden, wanted = torch.randn(1, 6, 64), torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad(), Sizes() as sizes:  # type: ignore[no-untyped-call]
        tokens = argmax_tokens(model, None, hidden, wanted)
    assert torch.equal(tokens, head(hidden[0, :-1]).argmax(-1))
    assert sizes.shapes and weight.shape not in sizes.shapes


@pytest.mark.parametrize(
    ("model_type", "why"), [("phi", "does not support token rows"), ("llama", "beyond the 300 rows")]
)
def test_a_model_that_peft_cannot_keep_rows_of_is_refused(model_type: str, why: str) -> None:
    """A head with a bias, which peft would drop, and a token without a row."""
    model = build(model_type, tie_word_embeddings=False)
    with pytest.raises(UserError, match=why):
        add_lora(model, Lora(rank=4), parse_architecture(model.config.to_dict()), [300])


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tied head that never learned its turn's end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(END)
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def answering(recipe: MakeRecipe, base_model: Path, tmp_path: Path) -> Any:
    """A recipe that teaches a short answer, and when to stop."""
    rows = [{"prompt": f"what is {n}", "completion": "blue"} for n in range(40)]
    data = write_rows(tmp_path / "colors.jsonl", rows)

    def make(**settings: Any) -> RunDir:
        changes = {path.replace("__", "."): value for path, value in settings.items()}
        return create_run(
            recipe(
                {
                    "model.id": str(base_model),
                    "data.sources": (Source(path=str(data)),),
                    "data.packing": False,
                    "training.learning_rate": 1e-2,
                    "training.gradient_accumulation": 4,
                    "training.epochs": 2.0,
                    **changes,
                }
            )
        )

    return make


def turn_of(session: Any) -> tuple[str, str]:
    """What the adapter answers, and how the answer ends."""
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=12)
    reply = session.ask((Message("user", "what is 1"),), adapter_name="adapter", sampling=sampling)
    list(reply)
    return reply.outcome.text, reply.outcome.ending


def test_only_trained_rows_teach_a_base_model_to_stop(
    answering: Any, trainers: Trainers, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from qlora_tui.chat.effect_measurement import measure_effect
    from qlora_tui.chat.session import load_session
    from qlora_tui.export.merge import merge

    without = answering()
    assert trainers.run(without) == 0
    assert turn_of(load_session(run_source(without)))[1] == "most tokens"

    run = answering(lora__trainable_tokens=(END,), training__checkpoint_every=10)
    assert trainers.run(run) == 0
    session = load_session(run_source(run))
    assert turn_of(session) == ("blue", "turn end")
    again = interrupted_at(run, 10)
    assert trainers.run(again) == 0
    assert losses(again) == pytest.approx(losses(run), abs=EXACT)

    effect = measure_effect(session, "adapter")
    assert effect.token_rows == (END,) and effect.turns_ended == effect.turns > effect.turns_ended_by_base
    merged = AutoModelForCausalLM.from_pretrained(
        merge(run_source(run), "adapter", tmp_path / "out", base_name="original").folder
    )
    ids = torch.tensor([session.prompt((Message("user", "what is 1"),))])
    said = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert session.tokenizer.decode(said[0, ids.shape[1] :].tolist()) == f"blue{END}"
