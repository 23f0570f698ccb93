"""The sizes and constants of a model as GGUF keys, and checks for settings that llama.cpp cannot compute.

Sizes are read from the shapes of the tensors, constants from transformers' config. If llama.cpp has no key
for a setting, the setting must have the value that llama.cpp's architecture computes with: the default of the
config's class, unless ``conventions`` declares another value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qlora_tui.catalog.gguf_config import CONSTANTS, COUNTS, FIELDS
from qlora_tui.gguf_format.computed_keys import cannot_compute
from qlora_tui.gguf_format.conventions import Convention
from qlora_tui.gguf_format.tensors import SourceTensor

Value: TypeAlias = int | float | str | bool | list[bool] | list[int] | list[float]

SETTINGS = {
    **{key: (name,) for key, name in COUNTS.items()},
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    **{key: names for key, names in FIELDS.items() if key not in ("expert_count", "ssm.conv_kernel")},
}
"""Keys, for all architectures, whose values are not read from shapes. Each has the names of the settings that
may hold its value.
"""

_FLOATS = re.compile(r"scale|softcapping|epsilon|clamp")
_IS_SEEN = re.compile(
    r".*_size(_.*)?|.*(_dim|_rank|_heads|_layers|_experts|_bias|_types?|_pattern|_idxs|_eps|_epsilon|_ids?)$"
    r"|num_.*|n_.*|.*(dropout|pdrop)|.*max_position_embeddings|attention_bias|layer_types|head_dim"
    r"|.*initializer_.*|output_router_logits|router_(aux_loss_coef|jitter_noise)|use_cache|pretraining_tp"
    r"|rope_parameters|tie_word_embeddings|(use_)?sliding_window|max_window_layers|is_decoder|bias"
    r"|first_k_dense_replace|moe_layer_(start|end)_index"
)
"""Settings that need no key: shapes or presence of tensors determine them, separate rules write them, or
answers do not depend on them."""


@dataclass(frozen=True)
class Hyperparameters:
    """GGUF keys without the architecture's prefix, and notes for the user."""

    values: dict[str, Value]
    notes: tuple[str, ...] = ()
    """Sentences about what llama.cpp computes differently, and how the export handles it."""


def hyperparameters(config: Any, convention: Convention, tensors: Iterable[SourceTensor]) -> Hyperparameters:
    """Return the keys for a text config. Raises UserError for settings that llama.cpp cannot compute."""
    rope = rope_parameters(config)
    context, notes = _context_length(config, convention)
    head_size = _head_size(config)
    rotated = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    values: dict[str, Value] = {
        key: value
        for key, names in SETTINGS.items()
        if (value := _first(config, names)) is not None and not isinstance(value, list)
    }
    values |= {
        key: value
        for key in convention.reads
        if (value := _constant(key, _first(config, CONSTANTS[key]))) is not None
    }
    values |= {
        "context_length": context,
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "rope.dimension_count": int(head_size * rotated),
    }
    values |= _rope(config, rope, convention)
    values |= _windows(config, convention)
    values |= _from_shapes(tensors, config, convention)
    # Remove sizes of a kind of layer that the model class supports but this model lacks.
    for kind, evidence in (("expert_", "expert_count"), ("ssm.", "ssm.inner_size")):
        if evidence not in values:
            values = {key: value for key, value in values.items() if not key.startswith(kind)}
    return Hyperparameters(values | convention.keys(config), notes)


def _first(config: Any, names: Iterable[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _constant(key: str, value: Any) -> Any:
    """Return a constant as llama.cpp reads it; None if the key can be omitted, because llama.cpp's default
    has no effect.
    """
    if value is None:
        # llama.cpp's default is a bound, although the class has none.
        return 0.0 if key.endswith("softcapping") else None
    return float(value) if _FLOATS.search(key) and not isinstance(value, bool) else value


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def require_computed(config: Any, convention: Convention) -> None:
    """Raise UserError for a setting whose value differs from what llama.cpp computes with."""
    written = {
        name
        for key, names in (SETTINGS | CONSTANTS).items()
        if key in SETTINGS or key in convention.reads
        for name in names
    }
    written |= {config.attribute_map[name] for name in written if name in config.attribute_map}
    from transformers import PreTrainedConfig

    known = written | convention.folded | set(PreTrainedConfig().to_dict())
    values = config.to_dict()
    for name, usual in type(config)().to_dict().items():
        value, expected = values.get(name), convention.fixed.get(name, usual)
        if value is None and usual is not None and name in written:
            raise cannot_compute(f"it has no {name}")
        is_seen = name in known or _IS_SEEN.fullmatch(name) or name.startswith("_")
        if is_seen and name not in convention.fixed:
            continue
        if _plain(value) != _plain(expected) and (value or expected):
            raise cannot_compute(f"its {name} is {value}, not {expected}")


_ALIKE = {
    "swish": "silu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"), "gelu"),
}
"""Activations that llama.cpp computes alike. Its GELU uses tanh, which differs by less than 0.0005."""


def _plain(value: Any) -> Any:
    return _ALIKE.get(value, value) if isinstance(value, str) else value


def _from_shapes(tensors: Iterable[SourceTensor], config: Any, convention: Convention) -> dict[str, Value]:
    """Return the parameters that follow from the tensors' shapes, including those that differ by layer."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    layers = range(config.num_hidden_layers)

    def by_layer(name: str, dim: int = -1) -> list[int]:
        return [shapes[key][dim] if (key := f"blk.{layer}.{name}") in shapes else 0 for layer in layers]

    def one(name: str, dim: int = -1) -> int:
        return max(by_layer(name, dim), default=0)

    values: dict[str, Value] = {}
    dense, experts = by_layer("ffn_down.weight"), by_layer("ffn_down_exps.weight", 0)
    widths = set(dense) - {0}
    if convention.kv_by_layer:
        # The width also shows which layers have no feed-forward network.
        dense = [one or other for one, other in zip(dense, by_layer("ffn_down_exps.weight"), strict=True)]
        widths = set(dense)
    if len(widths) == 1:
        values["feed_forward_length"] = widths.pop()
    elif widths:
        values["feed_forward_length"] = dense
    if any(experts):
        values |= {"expert_count": max(experts), "expert_feed_forward_length": one("ffn_down_exps.weight")}
        if shared := one("ffn_down_shexp.weight"):
            values["expert_shared_feed_forward_length"] = shared
        first = next(layer for layer in layers if experts[layer])
        if convention.dense_layers == "first":
            values["leading_dense_block_count"] = first
        expected = experts[first:] if convention.dense_layers == "first" else experts
        if convention.dense_layers != "any" and not all(expected):
            raise cannot_compute("some of its layers have no experts")
    if inner := one("ssm_out.weight"):
        values |= {
            "ssm.inner_size": inner,
            "ssm.conv_kernel": one("ssm_conv1d.weight"),
            "ssm.time_step_rank": one("ssm_dt.bias"),
        }
    if convention.kv_by_layer:
        values["attention.head_count_kv"] = [
            rows // _head_size(config) for rows in by_layer("attn_k.weight", 0)
        ]
    return values


def _context_length(config: Any, convention: Convention) -> tuple[int, tuple[str, ...]]:
    """Return the context length, and notes for the user. The length is reduced if llama.cpp would otherwise
    compute texts differently from training.

    llama.cpp uses longrope's long factors for every text if the file's context is longer than the original
    context (src/llama-model.cpp, ``get_rope_factors``). transformers uses them only if the text itself is
    longer.
    """
    length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
    notes = []
    rope = rope_parameters(config)
    if rope.get("rope_type") == "longrope":
        whole, length = length, rope.get("original_max_position_embeddings") or length
        if length < whole:
            override = f"--override-kv {convention.architecture}.context_length=int:{whole} -c {whole}"
            notes.append(
                f"The file's context length is {length:,} tokens: with a longer one, llama.cpp computes "
                f"short texts differently from training (longrope). For longer texts, "
                f"add {override} to the llama.cpp command."
            )
    if rope.get("truncate") is False:
        notes.append(
            "llama.cpp rounds the bounds between scaled and unscaled frequencies (YaRN), but training "
            "did not, so its answers differ by a KL divergence of about 0.00001."
        )
    window = _window(config)
    if window and not convention.windows and window < length:
        length = window
        notes.append(
            f"Each token attends only to the {window:,} tokens before it, which llama.cpp does not support "
            f"for this family of models. The file's context length is {window:,} tokens, so that the "
            "answers match those of the trained model."
        )
    return length, tuple(notes)


def _window(config: Any) -> int:
    """Return the sliding window in tokens; 0 if no layer has one."""
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    return window if not kinds or "sliding_attention" in kinds else 0


def _windows(config: Any, convention: Convention) -> dict[str, Value]:
    window = _window(config)
    if not convention.windows or not window:
        return {}
    return {
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters for layers with full attention; empty if the model has no
    rotary embedding.
    """
    parameters: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _rope(config: Any, rope: Mapping[str, Any], convention: Convention) -> dict[str, Value]:
    """Return the keys of the rotary embedding, including those for layers with sliding windows."""
    values: dict[str, Value] = {}
    if (base := rope.get("rope_theta")) is not None:
        values["rope.freq_base"] = float(base)
    sliding = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if sliding:
        if sliding.get("rope_type", "default") != "default":
            raise cannot_compute("the rotary embedding of its sliding layers is scaled")
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3", "proportional"):  # the factors of the last two kinds are a tensor
        return values
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind not in ("yarn", "longrope"):
        raise cannot_compute(f"its rotary embedding is scaled by {kind}")
    values["rope.scaling.type"] = kind
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    values["rope.scaling.original_context_length"] = original
    attention_factor = float(_rope_init(kind, config)[1])
    if kind == "yarn":
        factor = float(rope["factor"])
        values["rope.scaling.factor"] = factor
        if convention.yarn_multiplier and (scale := rope.get("mscale_all_dim")):
            values["rope.scaling.yarn_log_multiplier"] = convention.yarn_multiplier * scale
            if attention_factor != 1.0:
                raise cannot_compute("mscale and mscale_all_dim of its rotary embedding differ")
        else:
            # llama.cpp computes YaRN's own factor itself.
            attention_factor /= 1.0 + 0.1 * math.log(factor)
    if kind == "longrope" or not math.isclose(attention_factor, 1.0, rel_tol=1e-6):
        values["rope.scaling.attn_factor"] = attention_factor
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (value := rope.get(name)) is not None:
            values[f"rope.scaling.yarn_{name}"] = float(value)
            if value != usual:
                raise cannot_compute(f"the {name} of its rotary embedding is {value}, not {usual}")
    return values


def _rope_init(kind: str, config: Any) -> Any:
    """Return transformers' frequencies and attention factor for layers with full attention."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layers = {"layer_type": "full_attention"} if "full_attention" in config.rope_parameters else {}
    return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"), **layers)


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Return tensors that only GGUF files have: float32 factors that divide the rotary embedding's
    frequencies.

    With ``llama3`` scaling, there is one factor per frequency, and half as many frequencies as the head size;
    transformers computes the scaled frequencies itself. With ``proportional``, the factor is 1 for
    frequencies that rotate, and so large for the others that they do not rotate. With ``longrope``, there are
    two tensors, from the config's lists of long and short factors.
    """
    rope = rope_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind in ("llama3", "proportional"):
        scaled, _ = _rope_init(kind, config)
        dim = 2 * len(scaled)
        plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        factors = torch.where(scaled > 0, plain / scaled, torch.tensor(1e30))
        return {"rope_freqs.weight": factors}
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}
