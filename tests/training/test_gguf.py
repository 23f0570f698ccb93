"""The folder made the short way is what transformers makes of the file, and has a better tokenizer."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.gguf import read_gguf
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.training.gguf_conversion import convert_in_child
from qlora_tui.training.gguf_llama import is_known
from qlora_tui.training.gguf_worker import convert
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.slow

TURNS = [{"role": "user", "content": "the 12\n\n 34"}, {"role": "assistant", "content": "Aye."}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(file: Path) -> Path:
    converted = file.parent / "converted"
    convert(file, converted)
    return converted


def test_every_weight_is_as_transformers_reads_it(file: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    reference = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    ).state_dict()
    del reference["lm_head.weight"]  # tied to the embeddings, and stored once
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, reference[name]), name


def test_transformers_loads_the_folder_with_nothing_missing(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings


def test_a_turn_ends_the_generation(folder: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    generation = GenerationConfig.from_pretrained(str(folder))
    assert tokenizer.eos_token == "<|im_end|>"
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_renders_and_special_tokens_are_single(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text.startswith("<|im_start|>user\nthe 12")
    ids = tokenizer.apply_chat_template(TURNS)["input_ids"]
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(begin), ids.count(end)) == (2, 2)
    assert tokenizer.decode(ids) == text
    assert "<|" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_tokenizers_alone_reads_it_and_text_survives_the_round_trip(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("the sea, at 6:05", "naïve — 日本\n\n\tx = [1, 22]", " the  the"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_stand_alone(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # With the plain GPT-2 rule the space would go with the digits, and the longer token be missed.
    assert tokenizer.encode("the\n\n 34").tokens == ["the", "ĊĊĠ", "3", "4"]


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_template_for_tools_comes_along(tmp_path: Path, pre: str) -> None:
    convert(write_tiny_gguf(tmp_path / "tiny.gguf", pre=pre, tool_template="{{ tools }}"), tmp_path / "model")
    tokenizer = ChatTokenizer.from_folder(tmp_path / "model")
    assert tokenizer.tool_template.text == "{{ tools }}" != tokenizer.template.text


def test_another_vocabulary_goes_the_general_way(tmp_path: Path) -> None:
    known = write_tiny_gguf(tmp_path / "known.gguf")
    assert is_known(read_gguf(known))
    assert not is_known(read_gguf(write_tiny_gguf(tmp_path / "other.gguf", pre="qwen2")))


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "other.gguf", architecture="unheard-of")
    with pytest.raises(UserError, match="cannot be used") as raised:
        convert(file, tmp_path / "converted")
    assert "unheard-of" in raised.value.what
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    """Here a limit on the size of a file, which the weights are the first to reach."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    try:
        with pytest.raises(UserError, match="too large"):
            convert_in_child(file, tmp_path / "folder")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_header_is_read_once_for_tokenizer_config_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    from qlora_tui.training import gguf_streaming

    opened: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    file = write_tiny_gguf(tmp_path / "other.gguf", pre="qwen2")
    (tmp_path / "converted").mkdir()
    gguf_streaming.write(file, tmp_path / "converted", "llama", lambda done, total: None)
    assert len(opened) == 1
    assert gguf.GGUFReader is Counted
