"""The short way for a plain Llama in a GGUF file, as the demo's is.

transformers' own parses the file several times and loses the rule that digits stand alone; here it is read
once, in a quarter of the time, and the tokenizer is as its makers published it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import GgufHeader
from qlora_tui.training.vocabulary import KIND, tokenizer_from

WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in the GGUF file (llama.cpp's), and as transformers has them."""
_IN_A_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_NEEDED = (
    "tokenizer.chat_template",
    *(f"tokenizer.ggml.{special}_token_id" for special in ("bos", "eos", "padding", "unknown")),
)


def is_known(header: GgufHeader) -> bool:
    """Whether the file is a plain Llama with such a vocabulary: nothing is missing, nothing unknown."""
    kind = (header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre"))
    return (
        header.architecture == "llama"
        and kind == KIND
        and header.values.get("llama.rope.scaling.type", "none") == "none"
        and all(key in header.values for key in _NEEDED)
        and all(_name(tensor) for tensor in header.tensors)
    )


def write(file: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bfloat16 safetensors of a file that is known."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    header = {key: field.contents() for key, field in reader.fields.items()}
    _write_tokenizer(header, folder)
    _write_config(header, reader, folder)
    _write_weights(header, reader, folder)


def _name(tensor: str) -> str | None:
    """What transformers calls it."""
    layer = _IN_A_LAYER.fullmatch(tensor)
    if layer is None:
        return WHOLE_MODEL.get(tensor)
    kind = IN_A_LAYER.get(layer[2])
    return kind and f"model.layers.{layer[1]}.{kind}.weight"


def _write_tokenizer(header: dict[str, Any], folder: Path) -> None:
    tokens = header["tokenizer.ggml.tokens"]
    tokenizer_from(header).save(str(folder / "tokenizer.json"))
    special = {
        name: tokens[header[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": header["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            **special,
        },
    )
    (folder / "chat_template.jinja").write_text(header["tokenizer.chat_template"], encoding="utf-8")


def _write_config(header: dict[str, Any], reader: Any, folder: Path) -> None:
    special = {
        f"{name}_token_id": header[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(header["tokenizer.ggml.tokens"]),
        "hidden_size": header["llama.embedding_length"],
        "intermediate_size": header["llama.feed_forward_length"],
        "num_hidden_layers": header["llama.block_count"],
        "num_attention_heads": header["llama.attention.head_count"],
        "num_key_value_heads": header["llama.attention.head_count_kv"],
        "max_position_embeddings": header["llama.context_length"],
        # Stored in 32 bits: as many digits as those hold, so that 1e-05 reads 1e-05.
        "rms_norm_eps": float(f"{header['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": header["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        **special,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)


def _write_weights(header: dict[str, Any], reader: Any, folder: Path) -> None:
    import numpy as np
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": header["llama.attention.head_count"],
        "attn_k": header["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        # What is stored in 32 bits comes as a view of the file, which torch may not write to: copied.
        values = np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")
        weight = torch.from_numpy(values)
        layer = _IN_A_LAYER.fullmatch(tensor.name)
        if layer is not None and layer[2] in heads:
            weight = _halves_apart(weight, heads[layer[2]])
        name = _name(tensor.name)
        assert name is not None
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _halves_apart(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of the rows of q and k.

    Its rotary embedding turns neighbouring rows of a head together, (0, 1), (2, 3), …; that of transformers
    a row and the one half a head further, (0, d/2), (1, d/2 + 1), …
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
