"""A converted GGUF file is what transformers makes of it, whichever way its weights are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.training import gguf_weights
from qlora_tui.training.gguf_conversion import convert_in_child
from qlora_tui.training.gguf_weights import convert
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_trainers")]

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


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_template_for_tools_comes_along(tmp_path: Path, pre: str) -> None:
    convert(write_tiny_gguf(tmp_path / "tiny.gguf", pre=pre, tool_template="{{ tools }}"), tmp_path / "model")
    tokenizer = ChatTokenizer.from_folder(tmp_path / "model")
    assert tokenizer.tool_template.text == "{{ tools }}" != tokenizer.template.text


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "other.gguf", architecture="unheard-of")
    with pytest.raises(UserError, match="cannot be used") as raised:
        convert(file, tmp_path / "converted")
    assert "unheard-of" in raised.value.what
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a limit on the size of a file, which the weights are the first to reach."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, resource.RLIM_INFINITY))"
    monkeypatch.setenv("BEFORE_TRAINER", f"import resource; {limit}")
    with pytest.raises(UserError, match="too large"):
        convert_in_child(file, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY, LAYERS = 64, 96, 4, 2, 320, 2
NORMS = {"llama": 2, "qwen2": 2, "qwen3": 2, "phi3": 2, "starcoder2": 2, "gemma2": 4, "gemma3": 4}
HEAD_NORMS = ("qwen3", "gemma3")
UNTIED = ("qwen2", "phi3")
BIASED = {
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "starcoder2": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"),
}
HEAD_DIM = {"qwen3": 128}
"""transformers reads no other for Qwen 3."""


def write_model(path: Path, architecture: str) -> Path:
    """A random model of two layers, norm weights as far from one as Gemma's."""
    import numpy as np
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter, quantize

    random = np.random.default_rng(3)
    head = HEAD_DIM.get(architecture, HIDDEN // HEADS)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(1e-6)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_merges(["t 0"])
    writer.add_pad_token_id(0)

    def add(name: str, shape: tuple[int, ...], kind: Kind = Kind.Q8_0) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values *= 300
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCABULARY, HIDDEN))
    add("output_norm.weight", (HIDDEN,), Kind.F32)
    if architecture in UNTIED:
        add("output.weight", (VOCABULARY, HIDDEN))
    if architecture == "starcoder2":
        add("output_norm.bias", (HIDDEN,), Kind.F32)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        rows = {"attn_q": HEADS * head, "attn_k": KV_HEADS * head, "attn_v": KV_HEADS * head}
        rows |= {"attn_output": HIDDEN, "ffn_gate": FEED_FORWARD, "ffn_up": FEED_FORWARD, "ffn_down": HIDDEN}
        if architecture == "phi3":
            rows = {"attn_qkv": sum(rows.pop(f"attn_{part}") for part in "qkv"), **rows}
            rows["ffn_up"] += rows.pop("ffn_gate")
        if architecture == "starcoder2":
            del rows["ffn_gate"]
        columns = {"attn_output": HEADS * head, "ffn_down": FEED_FORWARD}
        for name, length in rows.items():
            add(f"{block}.{name}.weight", (length, columns.get(name, HIDDEN)))
            if name in BIASED.get(architecture, ()):
                add(f"{block}.{name}.bias", (length,), Kind.F32)
        names = ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"][: NORMS[architecture]]
        for name in names:
            add(f"{block}.{name}.weight", (HIDDEN,), Kind.F32)
            if architecture == "starcoder2":
                add(f"{block}.{name}.bias", (HIDDEN,), Kind.F32)
        if architecture in HEAD_NORMS:
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"{block}.{name}.weight", (head,), Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", list(NORMS))
def test_every_family_is_as_transformers_reads_it(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    # Blocks of five rows: the last one of each tensor is not full.
    monkeypatch.setattr(gguf_weights, "BLOCK_BYTES", 5 * 4 * HIDDEN)
    file = write_model(tmp_path / "model.gguf", architecture)
    convert(file, tmp_path / "converted")
    reference: Any = AutoModelForCausalLM.from_pretrained(
        str(tmp_path),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    ).state_dict()
    if architecture not in UNTIED:
        del reference["lm_head.weight"]  # tied to the embeddings, and stored once
    weights = load_file(tmp_path / "converted" / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, reference[name]), name


def test_rounding_to_bfloat16_is_torchs() -> None:
    import numpy as np
    import torch

    bits = np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint32)
    # Ties, both ways; the largest float32, which rounds to infinity; infinities; zeros of either sign.
    special = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x00000001]
    values = np.concatenate([bits, np.array(special, dtype=np.uint32)]).view(np.float32)
    reference = torch.from_numpy(values.copy()).to(torch.bfloat16)
    rounded = torch.from_numpy(gguf_weights._bfloat16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(rounded.isnan(), reference.isnan())
    assert torch.equal(rounded[~rounded.isnan()], reference[~reference.isnan()])


def rewritten(file: Path, target: Path, key: str, value: int) -> Path:
    """A copy with another whole number at a key."""
    data = file.read_bytes()
    at = data.index(key.encode()) + len(key)
    target.write_bytes(data[: at + 4] + value.to_bytes(4, "little") + data[at + 8 :])
    return target


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.block_count", 900_000, "block_count is 900,000"),
        ("llama.block_count", 900, "900 layers"),
        ("llama.block_count", 3, "no tensor blk.2."),
        ("llama.block_count", 1, "a tensor blk.1."),
        ("llama.embedding_length", 65_536, "token_embd.weight is"),
        ("llama.attention.head_count_kv", 4, "attn_k.weight is"),
        ("tokenizer.ggml.eos_token_id", 4_000_000_000, ""),
    ],
)
def test_counts_that_are_not_those_of_the_tensors_are_refused_at_once(
    file: Path, tmp_path: Path, key: str, value: int, named: str
) -> None:
    changed = rewritten(file, tmp_path / "changed.gguf", key, value)
    if not named:
        convert(changed, tmp_path / "converted")
        assert "eos_token" not in (tmp_path / "converted" / "tokenizer_config.json").read_text()
        return
    with pytest.raises(UserError) as refused:
        convert(changed, tmp_path / "converted")
    assert named in refused.value.what
    assert not (tmp_path / "converted").exists()


def test_a_file_without_its_last_tensors_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(UserError, match="the file ends before its tensor"):
        convert(tmp_path / "short.gguf", tmp_path / "converted")
