"""Architectures that another process reads from transformers: kept, and bounded whatever a config says."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.errors import UserError
from qlora_tui.paths import cache_dir
from qlora_tui.worker import Failure, run_job

TINY: dict[str, Any] = {
    "model_type": "apertus",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


class Process:
    """Stands for the process that imports transformers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: described.Description) -> None:
        self.found = found
        self.calls = 0
        monkeypatch.setattr(described, "run_job", self)

    def __call__(self, job: str, configs: list[Any], **_: Any) -> list[described.Description]:
        self.calls += 1
        return [self.found] * len(configs)


def _exact() -> Architecture:
    return parse_architecture({**TINY, "model_type": "llama"})


def test_a_type_without_a_table_has_an_outline_until_it_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, described.Description(architecture=_exact()))
    assert parse_architecture(TINY).is_outline
    assert described.describe(TINY) == _exact()
    assert parse_architecture(TINY) == described.describe(TINY) == _exact()
    assert process.calls == 1


def test_a_damaged_description_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, described.Description(architecture=_exact()))
    described.describe(TINY)
    (file,) = (cache_dir() / "descriptions").iterdir()
    for damaged in (b"", b"{}", b'{"architecture": 1}', b"\xff" * 10, file.read_bytes()[:-9]):
        file.write_bytes(damaged)
        assert parse_architecture(TINY).is_outline
        described.describe(TINY)
    assert process.calls == 6


@pytest.mark.parametrize(("package", "calls"), [("no-such-package", 1), ("msgspec", 2)])
def test_a_refusal_is_kept_until_its_package_is_installed(
    monkeypatch: pytest.MonkeyPatch, package: str, calls: int
) -> None:
    found = described.Description(refusal=Failure("No", "what"), missing=(package,))
    process = Process(monkeypatch, found)
    for _ in range(2):
        with pytest.raises(UserError, match="what"):
            described.describe(TINY)
    assert process.calls == calls


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Process(monkeypatch, described.Description(architecture=_exact()))
    monkeypatch.setattr(described, "MAX_FILES", 3)
    described.describe_all({**TINY, "vocab_size": size} for size in range(100, 110))
    assert len(list((cache_dir() / "descriptions").iterdir())) == 3


@pytest.mark.slow
def test_a_process_describes_what_it_can_and_refuses_the_rest() -> None:
    hostile: list[dict[str, Any]] = [
        {**TINY, "num_hidden_layers": 10**6},
        {**TINY, "hidden_size": 1 << 31},
        {**TINY, "hidden_size": -64},
        {**TINY, "num_attention_heads": 0},
        {**TINY, "hidden_size": float("inf")},
        {**TINY, "layer_types": ["x"] * 100_000},
        {**TINY, "rope_parameters": {"rope_type": "none", "rope_theta": "x"}},
        {"model_type": "mistral3", "text_config": []},
        {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "hidden_size": None}},
        {"model_type": "mixtral", "num_local_experts": 10**9},
        {"model_type": "qwen3_vl", "vision_config": {"depth": 10**5}},
        {"model_type": "lama"},
        {"model_type": "bert"},
    ]
    described.describe_all([*hostile, TINY])
    assert all((found := described.stored(config)) and found.refusal for config in hostile)
    exact = parse_architecture(TINY)
    assert exact.kinds() == ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert not exact.is_outline


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(described, "run_job", run_job)
    monkeypatch.setattr(described, "DEADLINE_S", 0.0)
    with pytest.raises(UserError, match="did not end"):
        described.describe(TINY)
