"""How near a file's answers must be, and the rows and positions that are compared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.export.base_choice import BaseChoice
from qlora_tui.export.gguf import GgufExport, GgufFile, _Export
from qlora_tui.export.gguf_file.writer import StoredTypes
from qlora_tui.export.proof import Proof, judged
from qlora_tui.export.reference import compared_rows, row_progress
from tests.export.published_tokenizers import write_tokenizer
from tests.training.tiny_model import CHAT_TEMPLATE

pytestmark = pytest.mark.slow


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
    assert "a file without it could not be told from this one" in small.sentence
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
    with pytest.raises(UserError, match="outside the bound") as missed:
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
    assert "compared at 100 of 20,112 trained tokens" in replace(proof, trained=20_112).sentence


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
