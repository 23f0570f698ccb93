"""Streamed weights are what transformers makes of the same file, in every family that is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_tui.catalog.gguf_header import read_gguf
from qlora_tui.training import gguf_weights
from qlora_tui.training.gguf_weights import all_known, weights_of, write_weights

pytestmark = pytest.mark.slow

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCABULARY, LAYERS = 64, 96, 4, 2, 320, 2
NORMS = {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma2": 4, "gemma3": 4}
HEAD_NORMS = ("qwen3", "gemma3")
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
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])

    def add(name: str, shape: tuple[int, ...], kind: Kind = Kind.Q8_0) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values *= 300
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", (VOCABULARY, HIDDEN))
    add("output_norm.weight", (HIDDEN,), Kind.F32)
    if architecture == "qwen2":
        add("output.weight", (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_q.weight", (HEADS * head, HIDDEN))
        add(f"{block}.attn_k.weight", (KV_HEADS * head, HIDDEN))
        add(f"{block}.attn_v.weight", (KV_HEADS * head, HIDDEN))
        add(f"{block}.attn_output.weight", (HIDDEN, HEADS * head))
        if architecture == "qwen2":
            add(f"{block}.attn_q.bias", (HEADS * head,), Kind.F32)
            add(f"{block}.attn_k.bias", (KV_HEADS * head,), Kind.F32)
            add(f"{block}.attn_v.bias", (KV_HEADS * head,), Kind.F32)
        add(f"{block}.ffn_gate.weight", (FEED_FORWARD, HIDDEN))
        add(f"{block}.ffn_up.weight", (FEED_FORWARD, HIDDEN))
        add(f"{block}.ffn_down.weight", (HIDDEN, FEED_FORWARD))
        names = ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"][: NORMS[architecture]]
        for name in names:
            add(f"{block}.{name}.weight", (HIDDEN,), Kind.F32)
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
    assert all_known(read_gguf(file))
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
    if architecture != "qwen2":
        del reference["lm_head.weight"]  # tied to the embeddings, and stored once
    weights = load_file(tmp_path / "model.safetensors")
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


def test_a_tensor_without_a_name_is_not_streamed(tmp_path: Path) -> None:
    header = read_gguf(write_model(tmp_path / "model.gguf", "llama"))
    assert all_known(header)
    header.tensors["rope_freqs.weight"] = (8,)
    assert not all_known(header)
