"""Streamed weights are what transformers makes of the same file, in every family that is streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.training import gguf_streaming, gguf_weights
from qlora_tui.training.gguf_weights import weights_of, write_weights

pytestmark = pytest.mark.slow

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


def write_model(path: Path, architecture: str, rope_base: float = 10_000.0) -> Path:
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
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(rope_base)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
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
def test_every_weight_is_as_transformers_reads_it(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    # Blocks of five rows: the last one of each tensor is not full.
    monkeypatch.setattr(gguf_weights, "BLOCK_BYTES", 5 * 4 * HIDDEN)
    file = write_model(tmp_path / "model.gguf", architecture)
    write_weights(
        weights_of(GGUFReader(file), architecture, HEADS, KV_HEADS),
        tmp_path / "model.safetensors",
        lambda done, total: None,
    )
    reference: Any = AutoModelForCausalLM.from_pretrained(
        str(tmp_path),
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    ).state_dict()
    if architecture not in UNTIED:
        del reference["lm_head.weight"]  # tied to the embeddings, and stored once
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, reference[name]), name


@pytest.mark.parametrize("architecture", ["starcoder2", "gemma3"])
def test_the_rotary_base_of_the_file_is_used(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    class NoTokenizer:
        from_pretrained = save_pretrained = classmethod(lambda cls, *args, **kwargs: cls)

    monkeypatch.setattr(transformers, "AutoTokenizer", NoTokenizer)
    file = write_model(tmp_path / "model.gguf", architecture, 999_999.0)
    gguf_streaming.write(file, tmp_path, architecture, lambda done, total: None)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert rope.get("full_attention", rope)["rope_theta"] == 999_999
    assert rope.get("sliding_attention", {}).get("rope_theta", 10_000) == 10_000


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
