"""Exports that are broken on purpose: llama.cpp's comparison refuses each, and no file is left.

How near a file's answers must be, and the rows and positions that are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from msgspec import structs

from qlora_tui.adapters.deltas import LoraDelta
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export import gguf
from qlora_tui.export.base_choice import BaseChoice
from qlora_tui.export.gguf import GgufExport, GgufFile, _Export, export_gguf
from qlora_tui.export.gguf_file import content, vocabulary
from qlora_tui.export.gguf_file.parameters import hyperparameters
from qlora_tui.export.gguf_file.vocabulary import CONTROL, NORMAL, Vocabulary
from qlora_tui.export.gguf_file.writer import StoredTypes
from qlora_tui.export.proof import Proof, judged, prove
from qlora_tui.export.reference import Reference, compared_rows, reference_answers, row_progress
from qlora_tui.gguf_format import conventions, rewrites, tensors
from qlora_tui.gguf_format.conventions import CONVENTIONS
from tests.export.export_sources import make_source
from tests.export.gguf_files import write_base
from tests.export.published_tokenizers import write_tokenizer
from tests.support.polling import wait_for
from tests.training.tiny_model import CHAT_TEMPLATE

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

GEMMA: dict[str, Any] = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 3
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {}),
    "llama-3": ("llama", {}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "gemma": ("gemma3_text", GEMMA),
}
"""Model type and settings by the tokenizer's name."""
Break = Callable[[pytest.MonkeyPatch], None]


def changed_vocabulary(change: Callable[[Vocabulary], dict[str, Any]]) -> Break:
    def break_it(monkeypatch: pytest.MonkeyPatch) -> None:
        def read(*args: Any) -> Vocabulary:
            right = vocabulary.read_vocabulary(*args)
            return replace(right, **change(right))

        monkeypatch.setattr(content, "read_vocabulary", read)

    return break_it


def changed_hyperparameters(**values: Any) -> Break:
    def break_it(monkeypatch: pytest.MonkeyPatch) -> None:
        def read(*given: Any) -> Any:
            right = hyperparameters(*given)
            return replace(right, values=right.values | {k.replace("__", "."): v for k, v in values.items()})

        monkeypatch.setattr(content, "hyperparameters", read)

    return break_it


def swapped_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "permute_for_interleaved_rope", lambda values, *_: values)


def half_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LoraDelta.change
    monkeypatch.setattr(LoraDelta, "change", lambda self: whole(self) / 2)


def no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraDelta, "apply_to", lambda self, weight: weight)


def no_norm_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    without = tuple(replace(each, rewrites=()) for each in CONVENTIONS)
    monkeypatch.setattr(conventions, "CONVENTIONS", without)


def own_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
        return {"output.weight": torch.randn(config.vocab_size, config.hidden_size)}

    monkeypatch.setattr(content, "extra_tensors", extra_tensors)


def no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    text_name = tensors.text_name
    monkeypatch.setattr(
        tensors,
        "text_name",
        lambda name, config: None if name == "lm_head.weight" else text_name(name, config),
    )


BROKEN: dict[str, tuple[str, Break, str]] = {
    "row order": ("llama-3", swapped_rows, "answers differ"),
    "half of the scale": ("smollm2", half_scale, "answers differ"),
    "no adapter": ("smollm2", no_adapter, "answers differ"),
    "embedding as head": ("llama-3", no_head, "answers differ"),
    "head beside a tied embedding": ("smollm2", own_head, "answers differ"),
    "norm offset": ("gemma", no_norm_offset, "answers differ"),
    "rope base": ("llama-3", changed_hyperparameters(rope__freq_base=5e5), "answers differ"),
    "rope base of windows": ("gemma", changed_hyperparameters(rope__freq_base_swa=1e6), "answers differ"),
    "norm epsilon": (
        "smollm2", changed_hyperparameters(attention__layer_norm_rms_epsilon=0.5), "answers differ"
    ),
    "template": ("smollm2", changed_vocabulary(lambda v: {"template": v.template + " "}), "chat template"),
    "begin token twice": ("smollm2", changed_vocabulary(lambda v: {"adds_bos": True}), "puts a begin token"),
    "no begin token": ("llama-3", changed_vocabulary(lambda v: {"adds_bos": False}), "does not put a begin"),
    "begin token of another": (
        "llama-3",
        changed_vocabulary(lambda v: {"special_ids": v.special_ids | {"bos": v.special_ids["eos"]}}),
        "begin token",
    ),
    "pre-tokenizer of Qwen": ("llama-3", changed_vocabulary(lambda v: {"pre": "qwen2"}), "different tokens"),
    "pre-tokenizer of GPT-2": ("llama-3", changed_vocabulary(lambda v: {"pre": "gpt-2"}), "different tokens"),
    "merges": (
        "smollm2", changed_vocabulary(lambda v: {"merges": (v.merges or [])[::-1]}), "different tokens"
    ),
    "scores": (
        "gemma", changed_vocabulary(lambda v: {"scores": [-s for s in v.scores or ()]}), "different tokens"
    ),
    "space before words": (
        "llama-2", changed_vocabulary(lambda v: {"adds_space": not v.adds_space}), "different tokens"
    ),
    "special tokens": (
        "llama-3",
        changed_vocabulary(lambda v: {"types": [NORMAL if t == CONTROL else t for t in v.types]}),
        "",
    ),
}  # fmt: skip
"""Tokenizer, what breaks the file, and what the comparison says."""


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatSource]:
    """The model, adapter and data of a tokenizer's name, written once."""

    @cache
    def source_of(kind: str) -> ChatSource:
        model_type, config = MODELS[kind]
        return make_source(tmp_path_factory.mktemp(kind), kind, model_type, **config)

    return source_of


@pytest.fixture(scope="module")
def reference_of(source_of: Callable[[str], ChatSource]) -> Callable[[str], Reference]:
    """The trained model's answers, computed once for each source."""
    return cache(lambda kind: reference_answers(source_of(kind), "adapter", lambda words: None))


@pytest.mark.parametrize(
    ("quantization", "kind"), [*(("none", kind) for kind in MODELS), ("nf4", "llama-2"), ("nf4", "gemma")]
)
def test_right_files_are_exported(tmp_path: Path, kind: str, quantization: str) -> None:
    model_type, config = MODELS[kind]
    source = make_source(tmp_path, kind, model_type, quantization=quantization, **config)
    result = export_gguf(source, "adapter", tmp_path / "out", ["F16"])
    proof = result.files[0].proof
    assert proof is not None and proof.divergence < 1e-3 < 0.1 < proof.effect
    assert proof.rows > 3 and proof.different_rows == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_embedding_and_head_are_exported(tmp_path: Path, tied: bool) -> None:
    whole = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    source = make_source(tmp_path, adapter=whole, tie_word_embeddings=tied)
    proof = export_gguf(source, "adapter", tmp_path / "out", ["F16"]).files[0].proof
    assert proof is not None and proof.divergence < 1e-3 < 0.1 < proof.effect


def test_an_embedding_trained_apart_from_a_tied_head_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path, adapter={"modules_to_save": ["embed_tokens"]}, tie_word_embeddings=True)
    with pytest.raises(UserError, match="trained embedding and head separately"):
        export_gguf(source, "adapter", tmp_path / "out", ["F16"])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(
    source_of: Callable[[str], ChatSource],
    reference_of: Callable[[str], Reference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    kind, break_it, says = BROKEN[name]
    source, reference = source_of(kind), reference_of(kind)
    monkeypatch.setattr(gguf, "reference_or_reason", lambda *_: reference)
    break_it(monkeypatch)
    with pytest.raises(UserError, match=r"does not answer like the adapter|could not") as refused:
        export_gguf(source, "adapter", tmp_path / "out" / "model.gguf", ["F16"])
    assert says in refused.value.what
    assert not list((tmp_path / "out").iterdir())


def test_the_sentence_says_how_near_the_answers_are(tmp_path: Path) -> None:
    source = make_source(tmp_path, quantization="nf4")
    proof = export_gguf(source, "adapter", tmp_path / "out", ["Q8_0"]).files[0].proof
    assert proof is not None
    assert proof.sentence.startswith("Q8_0: same top token in ")


def test_a_type_of_few_bits_without_the_adapter_is_refused(
    source_of: Callable[[str], ChatSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("smollm2")
    monkeypatch.setattr(LoraDelta, "apply_to", lambda self, weight: weight)
    with pytest.raises(UserError, match="does not answer like the adapter"):
        export_gguf(source, "adapter", tmp_path / "out", ["Q4_0"])
    assert not (tmp_path / "out").exists()


def test_a_bound_that_no_type_is_within_leaves_nothing(
    source_of: Callable[[str], ChatSource], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="No file type is within the --within limit") as refused:
        export_gguf(source_of("smollm2"), "adapter", tmp_path / "out", ["auto"], within=0.0)
    assert "The closest type: Q8_0: same top token" in refused.value.what
    assert not (tmp_path / "out").exists()


def test_a_bound_that_cannot_be_checked_is_an_error(tmp_path: Path) -> None:
    source = make_source(tmp_path, "smollm2", "llama", tie_word_embeddings=True)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="--within cannot be checked"):
        export_gguf(source, "adapter", tmp_path / "out", ["Q8_0"], within=0.1)


def test_a_16_bit_file_is_compared_once(
    source_of: Callable[[str], ChatSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[str] = []

    def counted(reference: Any, file: Path, file_type: str, *arguments: Any, **more: Any) -> Any:
        proved.append(file_type)
        return prove(reference, file, file_type, *arguments, **more)

    monkeypatch.setattr(gguf, "prove", counted)
    result = export_gguf(source_of("smollm2"), "adapter", tmp_path / "out", ["Q5_0", "BF16", "Q4_0"])
    assert proved == ["BF16", "Q5_0", "Q4_0"]
    assert [file.file_type for file in result.files] == ["Q5_0", "BF16", "Q4_0"]
    assert all(Path(file.path).is_file() for file in result.files)


def test_a_comparison_reports_its_rows_and_can_be_canceled(
    source_of: Callable[[str], ChatSource], tmp_path: Path
) -> None:
    source = source_of("smollm2")
    base = write_base(Path(source.recipe.model.id), tmp_path / "base.gguf")
    progress: list[tuple[int, int]] = []
    children = psutil.Process().children(recursive=True)

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    reference = reference_answers(source, "adapter", lambda words: None)
    prove(reference, base, "F16", on_progress=lambda *numbers: progress.append(numbers))
    with pytest.raises(KeyboardInterrupt):
        prove(reference, base, "F16", on_progress=cancel)
    total = sum(bool(row.positions) for row in reference.rows)
    assert progress == [(number + 1, total) for number in range(total)] and total > 3
    # A forked worker ends a moment after the process whose work it did.
    wait_for(lambda: psutil.Process().children(recursive=True) == children)


def proof_of(
    file_type: str, effect: float, divergence: float, turns_ended: int = 0, by_adapter: int = 0
) -> Proof:
    """What is said of a file type, an effect of the adapter and a divergence of the file."""
    proof = Proof(
        name=file_type, rows=0, different_rows=0, effect=effect, positions=100, trained=100,
        divergence=divergence, top1_matches=90, turns=12, turns_ended=turns_ended,
        turns_ended_by_adapter=by_adapter,
    )  # fmt: skip
    return judged(proof, file_type)


@pytest.mark.parametrize("file_type", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_0", "Q6_K"])
def test_a_file_farther_than_the_base_is_refused(file_type: str) -> None:
    assert "lost what was learned" in proof_of(file_type, effect=0.05, divergence=0.06).problem
    assert not proof_of(file_type, effect=0.05, divergence=0.04).problem


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0"])
def test_exact_types_are_within_an_eighth_of_the_effect(file_type: str) -> None:
    assert "rounding" in proof_of(file_type, effect=0.32, divergence=0.041).problem
    assert not proof_of(file_type, effect=0.16, divergence=0.003).problem


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_an_effect_too_small_to_measure_is_said(file_type: str) -> None:
    small = proof_of(file_type, effect=0.003, divergence=0.0035)
    assert not small.problem
    assert "a file without it could not be told apart from this one" in small.sentence
    assert "could not be told" not in proof_of(file_type, effect=0.3, divergence=0.003).sentence


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("ended, by_adapter", [(0, 3), (4, 9), (5, 12), (40, 100)])
def test_a_file_that_ends_few_turns_is_refused(file_type: str, ended: int, by_adapter: int) -> None:
    proof = proof_of(file_type, 0.3, 0.001, ended, by_adapter)
    assert f"it ends {ended} of 12 turns, and the adapter {by_adapter}" in proof.problem


@pytest.mark.parametrize("ended, by_adapter, loses", [
    (0, 1, False), (8, 9, False), (96, 100, False), (9, 6, False),
    (0, 2, True), (6, 9, True), (90, 100, True),
])  # fmt: skip
def test_fewer_turn_ends_are_a_warning(ended: int, by_adapter: int, loses: bool) -> None:
    proof = proof_of("Q4_K_M", 0.3, 0.01, ended, by_adapter)
    assert not proof.problem and proof.loses_turn_ends == loses
    file = GgufFile(path="a.gguf", file_type="Q4_K_M", bytes=1, types=StoredTypes({}), proof=proof)
    summary = GgufExport(files=(file,), base=BaseChoice(chosen="original")).summary
    assert ("some answers will run on. Try a larger type: Q5_K_M." in summary) == loses


def test_auto_skips_a_type_that_loses_turn_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"Q3_K_M": 6, "Q4_K_M": 9}

    def write(export: Any, kind: str) -> GgufFile:
        path = tmp_path / kind
        path.touch()
        proof = proof_of(kind, 0.3, 0.01, ended[kind], 9)
        return GgufFile(path=str(path), file_type=kind, bytes=1, types=StoredTypes({}), proof=proof)

    monkeypatch.setattr(_Export, "_write", write)
    content: Any = None
    export = _Export(content, tmp_path, "", 0.03, lambda words: None)
    (file,) = export.smallest_within(("Q3_K_M", "Q4_K_M"))
    assert file.file_type == "Q4_K_M"


@pytest.mark.parametrize("kind, advice", [("Q4_K_M", "a larger type, such as Q5_K_M"), ("F16", "Raise")])
def test_a_missed_bound_of_the_user_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, advice: str
) -> None:
    path = tmp_path / "file"
    path.touch()
    file = GgufFile(
        path=str(path), file_type=kind, bytes=1, types=StoredTypes({}), proof=proof_of(kind, 0.3, 0.003)
    )
    monkeypatch.setattr(_Export, "_write", lambda export, kind: file)
    content: Any = None
    with pytest.raises(UserError, match="does not meet --within") as missed:
        _Export(content, tmp_path, "", 0.001, lambda words: None).write(kind)
    assert "KL divergence of 0.003" in missed.value.what and advice in missed.value.fix
    assert "report" not in missed.value.fix and not path.exists()


@pytest.mark.parametrize("lost", ["Q3_K_M", "F16", "Q3_K_M F16"])
def test_a_refused_type_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    def write(export: Any, kind: str) -> GgufFile:
        path = tmp_path / kind
        path.touch()
        proof = proof_of(kind, 0.3, 9.0 if kind in lost else 0.001)
        return GgufFile(path=str(path), file_type=kind, bytes=1, types=StoredTypes({}), proof=proof)

    monkeypatch.setattr(_Export, "_write", write)
    content: Any = None
    export = _Export(content, tmp_path, "", None, lambda words: None)
    if " " in lost:
        with pytest.raises(UserError, match="does not answer"):
            export.write_all(lost.split())
        return
    files, refused = export.write_all(("Q3_K_M", "F16"))
    assert len(files) == len(refused) == 1 and files[0].file_type != lost
    assert refused[0].startswith(f"{lost}: its answers differ")


class Samples:
    """As many samples of as many tokens, of which the second half is trained and the last ends the turn."""

    def __init__(self, count: int, length: int, end: int) -> None:
        self.count, self.length, self.end = count, length, end

    def __len__(self) -> int:
        return self.count

    def token_ids(self, number: int) -> list[int]:
        return [5] * (self.length - 1) + [self.end]

    def loss_mask(self, number: int) -> bytes:
        return bytes(self.length // 2) + b"\1" * (self.length - self.length // 2)


@pytest.mark.parametrize("tokens", [204_800, 16_384, 500])
@pytest.mark.parametrize("count, length", [(300, 60), (300, 1000), (250, 5000), (5, 1000), (1, 40), (200, 2)])
def test_every_trained_position_of_as_many_rows_is_compared(
    tmp_path: Path, count: int, length: int, tokens: int
) -> None:
    tokenizer = ChatTokenizer.from_folder(write_tokenizer(tmp_path, "smollm2", CHAT_TEMPLATE))
    samples: Any = Samples(count, length, tokenizer.turn_end_ids[0])
    rows, trained = compared_rows(samples, tokenizer, tokens)
    computed = [row for row in rows if row.positions]
    longest = min(length, 4096, tokens)
    assert len(rows) == min(count, 200) and trained == len(rows) * (length - max(length // 2, 1))
    if longest > length // 2:
        assert len(computed) == min(len(rows), max(1, tokens // longest))
    assert all(row.positions == tuple(range(max(length // 2, 1) - 1, longest - 1)) for row in computed)
    assert sum(len(row.computed_ids) for row in computed) <= tokens
    if length <= 1000 and tokens == 204_800:
        assert sum(len(row.positions) for row in rows) == trained


def test_the_sentence_counts_tokens_that_were_not_compared() -> None:
    proof = proof_of("Q4_K_M", 0.3, 0.01)
    assert "trained tokens" not in proof.sentence
    assert "compared at 100 of 20,112 trained tokens" in structs.replace(proof, trained=20_112).sentence


def test_progress_names_rows_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said: list[str] = []
    report = row_progress(said.append, "Asking")
    for row in range(1, 41):
        now += 0.5 if row < 40 else 100
        report(row, 40)
    assert said[:2] == ["Asking: row 4 of 40, 18 s left", "Asking: row 8 of 40, 16 s left"]
    assert len(said) == 10 and said[-1] == "Asking: row 40 of 40"
    said.clear()
    report = row_progress(said.append, "Asking")
    for row in range(1, 4):
        now += 20
        report(row, 100)
    assert said == ["Asking: row 2 of 100, 33 min left"]
