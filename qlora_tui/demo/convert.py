"""A Llama in a GGUF file as a model folder: ``python -m qlora_tui.demo.convert FILE FOLDER``.

:mod:`.model` runs this in a child process, so that torch leaves with it. The general way, by transformers
(:mod:`qlora_tui.training.gguf`), parses the file several times and loses the rule that digits stand alone;
here it is read once, in a quarter of the time, and the tokenizer is as its makers published it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from qlora_tui.demo.vocabulary import tokenizer_from
from qlora_tui.errors import WRONG_CALL, Problem
from qlora_tui.files import private_dir

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


def convert(file: Path, folder: Path) -> None:
    """Make ``folder``, all of it or nothing: config, tokenizer, chat template, bfloat16 safetensors.

    Raises Problem where the file is not a Llama that can be converted; OSError, and safetensors' own error,
    where the folder cannot be written.
    """
    from gguf import GGUFReader

    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    private_dir(draft)
    try:
        reader = GGUFReader(file)
        header = {key: field.contents() for key, field in reader.fields.items()}
        if header.get("general.architecture") != "llama":
            raise _not_convertible(file, f"its architecture is {header.get('general.architecture')}")
        _write_tokenizer(header, draft)
        _write_config(header, reader, draft)
        _write_weights(header, reader, draft)
        draft.rename(folder)
    except (KeyError, ValueError) as error:
        raise _not_convertible(file, f"{type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _not_convertible(file: Path, why: str) -> Problem:
    return Problem(
        "The model file cannot be converted",
        what=f"{file}: {why}.",
        why="Only a Llama model with a GPT-2 vocabulary is converted here.",
        fix="Choose the model's safetensors folder or hub id instead.",
    )


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
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        # What is stored in 32 bits comes as a view of the file, which torch may not write to: copied.
        values = np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")
        weight = torch.from_numpy(values)
        if layer is None:
            name = WHOLE_MODEL[tensor.name]
        else:
            name = f"model.layers.{layer[1]}.{IN_A_LAYER[layer[2]]}.weight"
            if layer[2] in heads:
                weight = _halves_apart(weight, heads[layer[2]])
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


def main(arguments: list[str]) -> int:
    """Convert; a failure is told on stderr. Returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m qlora_tui.demo.convert FILE FOLDER", file=sys.stderr)
        return WRONG_CALL
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
