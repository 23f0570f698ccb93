"""Embedding and head trained in whole: exact, at their own rate, saved in peft's format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.chat.chat_sources import run_source
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora, Training
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import StepVerified
from qlora_tui.training import chunked_loss, head_chunks
from qlora_tui.training.adapter import add_lora
from qlora_tui.training.trained_embeddings import embedding_rate, trained_matrices
from tests.support.trainer_processes import Trainers
from tests.training.base_parameters import gradients_of_nothing, saved_logits
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.families import build, with_adapter
from tests.training.test_numerics import close, labeled
from tests.training.test_optimizers import DECAY, PEAK, groups, new_trainer
from tests.training.test_resume import interrupted_at
from tests.training.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


def adapted(model: Any, **lora: Any) -> Any:
    return with_adapter(model, train_embeddings=True, **lora)


def by_hand(model: Any, ids: Any, labels: Any) -> tuple[float, list[Any]]:
    """The loss of the merged model with its own matrices trained, and their gradients."""
    plain = model.merge_and_unload()
    for module in plain.modules():  # without our forwards, which the copies of embedding and head keep
        vars(module).pop("forward", None)
    matrices = {id(w): w for w in (plain.get_input_embeddings().weight, plain.get_output_embeddings().weight)}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    value = plain(input_ids=ids, labels=labels).loss
    value.backward()
    return value.item(), [matrix.grad for matrix in matrices.values()]


@pytest.mark.parametrize(
    ("model_type", "tied", "chunked"),
    [
        ("llama", True, True),
        ("llama", False, True),
        ("llama", False, False),
        ("gemma3_text", True, False),
        ("gemma2", True, True),  # caps its logits
        ("granite", False, True),  # scales them
        ("cohere", True, True),
    ],
)
def test_gradients_are_those_of_autograd(
    model_type: str, tied: bool, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(head_chunks, "block_rows", lambda device: 3)
    base = build(model_type, tie_word_embeddings=tied)
    ids, labels = labeled(base)
    ids[:, ::3], ids[:, 4] = 40, 0  # tokens that repeat, and the padding token
    head = chunked_loss.find_head(base)
    assert isinstance(head, head_chunks.ChunkedHead)
    model = adapted(base)
    expected, gradients = by_hand(copy.deepcopy(model), ids, labels)
    if chunked:
        chunked_loss.use_chunked_loss(base, head)
    # A second backward adds to the first.
    for _ in range(2):
        value = model.train()(input_ids=ids, labels=labels).loss
        (value / 2).backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    matrices = trained_matrices(model)
    assert len(matrices) == (1 if tied else 2)
    for matrix, gradient in zip(matrices, gradients, strict=True):
        assert matrix.dtype == torch.float32 and matrix.grad is not None
        assert close(matrix.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_gets_the_gradient_of_its_product(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "_GRADIENT_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    logit_grads = torch.randn(5, 20, generator=generator).to(dtype)
    chunk = torch.randn(5, 4, generator=generator).to(dtype)
    total = torch.ones(20, 4)
    chunked_loss.add_weight_gradient(total, logit_grads, chunk)
    expected = 1 + logit_grads.double().t() @ chunk.double()
    torch.testing.assert_close(total.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_reads_what_is_saved_and_says_the_same(tied: bool, tmp_path: Path) -> None:
    base = build("gemma3_text" if tied else "llama", tie_word_embeddings=tied).to(torch.bfloat16)
    model, ours, theirs = saved_logits(base, adapted, trained_matrices, tmp_path)
    with model.disable_adapter():
        assert not trained_matrices(model)
    # In the dtype of the model, as the base: the LoRA part is rounded otherwise.
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02 * float(ours.abs().max()))


def test_nothing_to_learn_leaves_a_gradient_of_zero() -> None:
    """Processes that train together wait for the gradient of each parameter."""
    base = build("llama", tie_word_embeddings=False)
    gradients = gradients_of_nothing(base, adapted, trained_matrices)
    assert gradients and all(grad is not None and not grad.any() for grad in gradients)


@pytest.mark.parametrize(("optimizer", "ratio"), [("adamw", 1.0), ("paged_adamw_8bit", 8.0)])
def test_embedding_and_head_have_their_own_rate(optimizer: str, ratio: float) -> None:
    model = adapted(build("llama", tie_word_embeddings=False))
    trainer = new_trainer(model, optimizer, lora_plus_ratio=ratio, embedding_learning_rate=3e-5)
    *others, (names, rate, decay) = groups(model, trainer.optimizer)
    assert (rate, decay) == (3e-5, DECAY)
    assert len(names) == 2 and all("modules_to_save" in name for name in names)
    assert [rate for _, rate, _ in others] == ([PEAK] if ratio == 1 else [PEAK, 8 * PEAK])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == names.union(*(names for names, _, _ in others))
    trainer.set_learning_rate(PEAK / 2)
    assert groups(model, trainer.optimizer)[-1][1] == pytest.approx(1.5e-5)


def test_the_rate_is_a_tenth_unless_it_is_set() -> None:
    assert embedding_rate(Training(learning_rate=5e-5)) == pytest.approx(5e-6)
    assert embedding_rate(Training(embedding_learning_rate=1e-5)) == 1e-5


def test_a_head_with_a_bias_is_refused() -> None:
    model = build("phi", tie_word_embeddings=False)
    with pytest.raises(UserError, match="head not an nn"):
        add_lora(model, Lora(rank=4, train_embeddings=True), parse_architecture(model.config.to_dict()))


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "float32"), ("paged_adamw_8bit", "bfloat16")])
def test_a_killed_run_resumes_to_the_same_matrices(
    recipe: MakeRecipe, trainers: Trainers, tmp_path: Path, optimizer: str, dtype: str
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from qlora_tui.export.merge import merge

    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    settings = {
        "model.id": str(base),
        "quantization.compute_dtype": dtype,
        "lora.train_embeddings": True,
        "training.optimizer": optimizer,
        "training.max_steps": 8,
        "training.checkpoint_every": 4,
        "training.general_prompts": 2,
        "training.neftune_alpha": 5.0,
    }
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    (verified,) = events_of(run, StepVerified)
    assert verified.agrees and not verified.replaced
    again = interrupted_at(run, 4)
    assert trainers.run(again) == 0
    assert losses(again) == losses(run)
    first, second = (load_file(each.adapter_dir / "adapter_model.safetensors") for each in (run, again))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    after = first["base_model.model.model.embed_tokens.weight"]
    assert after.equal(first["base_model.model.lm_head.weight"]) and not after.equal(before)
    if dtype == "float32":
        merged = merge(run_source(run), "adapter", tmp_path / "out", base_name="original")
        assert merged.check is not None and merged.check.agrees
        plain: Any = AutoModelForCausalLM.from_pretrained(base)
        theirs = PeftModel.from_pretrained(plain, str(run.adapter_dir)).merge_and_unload()
        ours = AutoModelForCausalLM.from_pretrained(merged.folder)
        for name, weight in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
