"""Trained rows of embedding and head, both in whole, and NEFTune: exact, saved in peft's format, resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_tui.chat.chat_sources import run_source
from qlora_tui.chat.chat_types import GREEDY
from qlora_tui.data.conversation import Message
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Lora, Source
from qlora_tui.runs.directory import RunDir, create_run
from qlora_tui.runs.events import Evaluated, StepVerified
from qlora_tui.training import loss
from qlora_tui.training.adapter import add_lora, load_adapter, save_adapter
from qlora_tui.training.description import architecture_of
from qlora_tui.training.embeddings import EmbeddingNoise, trained_matrices
from qlora_tui.training.evaluation import argmax_tokens
from qlora_tui.training.forgetting import equals_base
from qlora_tui.training.model import checkpoint_activations
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.families import build, with_adapter
from tests.training.test_loss import close, labeled
from tests.training.test_optimizers import DECAY, PEAK, groups, new_trainer
from tests.training.test_resume import EXACT, interrupted_at
from tests.training.tiny_model import make_tiny_model
from tests.tui.sample_data import write_rows

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
    monkeypatch.setattr(loss, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(loss, "block_rows", lambda device: 3)
    base = faint(model_type, tied=tied)
    ids, labels = labeled(base)
    ids[:, ::3], labels[:, 2::5] = IDS[0], IDS[1]
    head = loss.find_head(base)
    assert isinstance(head, loss.ChunkedHead)
    model = adapted(base)
    expected, gradients = by_hand(copy.deepcopy(model), ids, labels)
    if chunked:
        loss.use_loss(base, head)
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
    model = add_lora(base, Lora(rank=4), architecture_of(base.config.to_dict()), ids)
    assert equals_base(model) == (IDS[0] not in ids)


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gemma3_text", True)])
def test_plain_peft_reads_what_is_saved_and_says_the_same(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    _, ours, theirs = saved_logits(faint(model_type, tied=tied), adapted, trained_rows, tmp_path)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


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
        add_lora(model, Lora(rank=4), architecture_of(model.config.to_dict()), [300])


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
    from qlora_tui.chat.loading import load_session
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


def adapted_whole(model: Any, **lora: Any) -> Any:
    return with_adapter(model, train_embeddings=True, **lora)


def by_hand_whole(model: Any, ids: Any, labels: Any) -> tuple[float, list[Any]]:
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
    monkeypatch.setattr(loss, "LOSS_CHUNK_ROWS", 7)
    monkeypatch.setattr(loss, "block_rows", lambda device: 3)
    base = build(model_type, tie_word_embeddings=tied)
    ids, labels = labeled(base)
    ids[:, ::3], ids[:, 4] = 40, 0  # tokens that repeat, and the padding token
    head = loss.find_head(base)
    assert isinstance(head, loss.ChunkedHead)
    model = adapted_whole(base)
    expected, gradients = by_hand_whole(copy.deepcopy(model), ids, labels)
    if chunked:
        loss.use_loss(base, head)
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


@pytest.mark.parametrize(("adapt", "trained"), [(adapted, trained_rows), (adapted_whole, trained_matrices)])
def test_nothing_to_learn_leaves_gradients_of_zero(adapt: Callable[[Any], Any], trained: Trained) -> None:
    """Processes that train together wait for the gradient of each parameter."""
    base = faint("llama", tied=False)
    head = loss.find_head(base)
    assert isinstance(head, loss.ChunkedHead)
    model = adapt(base)
    loss.use_loss(base, head)
    ids, labels = labeled(base)
    nothing = torch.full_like(labels, loss.IGNORED)
    model.train()(input_ids=ids, labels=nothing, num_items_in_batch=1).loss.backward()
    gradients = [parameter.grad for parameter in trained(model)]
    assert gradients and all(grad is not None and not grad.any() for grad in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_gets_the_gradient_of_its_product(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_GRADIENT_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    logit_grads = torch.randn(5, 20, generator=generator).to(dtype)
    chunk = torch.randn(5, 4, generator=generator).to(dtype)
    total = torch.ones(20, 4)
    loss.add_weight_gradient(total, logit_grads, chunk)
    expected = 1 + logit_grads.double().t() @ chunk.double()
    torch.testing.assert_close(total.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_reads_whole_matrices_and_says_the_same(tied: bool, tmp_path: Path) -> None:
    base = build("gemma3_text" if tied else "llama", tie_word_embeddings=tied).to(torch.bfloat16)
    model, ours, theirs = saved_logits(base, adapted_whole, trained_matrices, tmp_path)
    with model.disable_adapter():
        assert not trained_matrices(model)
    # In the dtype of the model, as the base: the LoRA part is rounded otherwise.
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02 * float(ours.abs().max()))


@pytest.mark.parametrize(("optimizer", "ratio"), [("adamw", 1.0), ("paged_adamw_8bit", 8.0)])
def test_embedding_and_head_have_their_own_rate(optimizer: str, ratio: float) -> None:
    model = adapted_whole(build("llama", tie_word_embeddings=False))
    trainer = new_trainer(model, optimizer, lora_plus_ratio=ratio, embedding_learning_rate=3e-5)
    *others, (names, rate, decay) = groups(model, trainer.optimizer)
    assert (rate, decay) == (3e-5, DECAY)
    assert len(names) == 2 and all("modules_to_save" in name for name in names)
    assert [rate for _, rate, _ in others] == ([PEAK] if ratio == 1 else [PEAK, 8 * PEAK])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == names.union(*(names for names, _, _ in others))
    trainer.set_learning_rate(PEAK / 2)
    assert groups(model, trainer.optimizer)[-1][1] == pytest.approx(1.5e-5)


def test_a_head_with_a_bias_is_refused() -> None:
    model = build("phi", tie_word_embeddings=False)
    with pytest.raises(UserError, match="head not an nn"):
        add_lora(model, Lora(rank=4, train_embeddings=True), architecture_of(model.config.to_dict()))


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
        "training.max_steps": 4,
        "training.checkpoint_every": 2,
        "training.general_prompts": 2,
        "training.neftune_alpha": 5.0,
    }
    run = create_run(recipe(settings))
    assert trainers.run(run) == 0
    (verified,) = events_of(run, StepVerified)
    assert verified.agrees and not verified.replaced
    again = interrupted_at(run, 2)
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


ALPHA, WIDTH = 5.0, 16


class Embedded(nn.Module):
    """Only an embedding, of zeros: its output is the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        nn.init.zeros_(self.table.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def noise_of(batch: dict[str, Any]) -> torch.Tensor:
    model = Embedded()
    noise = EmbeddingNoise(model, ALPHA)
    torch.manual_seed(1)
    with noise.scaled_for(batch):
        inside: torch.Tensor = model.table(batch["input_ids"]).detach()
    assert not model.table(batch["input_ids"]).any()
    return inside


def test_the_noise_of_a_sample_is_that_of_transformers() -> None:
    from transformers.integrations import neftune

    hook: Any = neftune.neftune_post_forward_hook
    ids = torch.arange(7)[None]
    theirs: Any = Embedded().table
    theirs.neftune_noise_alpha = ALPHA
    torch.manual_seed(1)
    expected = hook(theirs, (ids,), theirs(ids)).detach()
    noise = noise_of({"input_ids": ids, "segments": [7]})
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(noise, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_each_sample_has_the_noise_of_its_length(packed: bool) -> None:
    lengths = [2, 50]
    if packed:
        noise = noise_of({"input_ids": torch.ones(1, 52, dtype=torch.long), "segments": lengths})[0]
        parts = [noise[:2], noise[2:]]
    else:
        mask = torch.arange(50) < torch.tensor(lengths)[:, None]
        noise = noise_of({"input_ids": torch.ones(2, 50, dtype=torch.long), "attention_mask": mask.long()})
        parts = [noise[0, :2], noise[1]]
    for part, length in zip(parts, lengths, strict=True):
        largest = ALPHA / (length * WIDTH) ** 0.5
        assert 0.8 * largest < part.abs().max() <= largest


def test_a_run_with_several_methods_resumes_exactly(recipe: MakeRecipe, trainers: Trainers) -> None:
    plain = {"training.max_steps": 4, "training.checkpoint_every": 2, "training.keep_checkpoints": 9}
    schedule = {"training.lr_scheduler": "cosine_with_restarts", "training.warmup_ratio": 0.1}
    methods = {
        "training.neftune_alpha": 5.0,
        "training.lora_plus_ratio": 4.0,
        "training.optimizer": "lion",
    }
    whole = create_run(recipe({**plain, **schedule, **methods}))
    assert trainers.run(whole) == 0
    again = interrupted_at(whole, 2)
    assert trainers.run(again) == 0
    assert losses(again) == losses(whole)
    without = create_run(recipe(plain))
    assert trainers.run(without) == 0
    # The noise moves the first step's loss, and not the evaluation before it.
    assert losses(whole)[1] != losses(without)[1]
    assert events_of(whole, Evaluated)[0].loss == events_of(without, Evaluated)[0].loss
