"""Converts the header of a GGUF file to the ``config.json`` of the model that it describes.

llama.cpp computes a model from metadata, from the presence of tensors, and from fixed rules in its code for
an architecture (:mod:`qlora_tui.catalog.gguf_architectures`). Each of these becomes a field of the config. If
a key is not read here, or transformers' class does not support its value, the file is refused and the key
named: a missing scale or window would not raise an error but give a different model, and the check of the
first training step would compare two equally wrong models. The conversion checks that the tensors are exactly
those of transformers' class (:mod:`qlora_tui.training.gguf_weights`).

Source of the names of keys: github.com/ggml-org/ggml, docs/gguf.md. Source of the keys and defaults of each
architecture: llama.cpp, src/models and src/llama-model.cpp (``load_hparams``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_tui.catalog.gguf import GgufHeader, gguf_problem
from qlora_tui.catalog.gguf_architectures import ARCHITECTURES, MIXTRAL, Config, GgufArchitecture
from qlora_tui.catalog.gguf_metadata import Metadata, in_words, is_same, shortest
from qlora_tui.catalog.gguf_tokenizers import PRE_TOKENIZERS
from qlora_tui.catalog.library_types import config_class

COUNTS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""Keys that have counts as values, in every architecture, and the config field for each key."""
FIELDS: Mapping[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "ssm.conv_kernel": ("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel"),
    "ssm.state_size": ("linear_key_head_dim", "mamba_d_state", "ssm_state_size", "state_size"),
    "ssm.group_count": ("linear_num_key_heads", "mamba_n_groups", "n_groups"),
    "shortconv.l_cache": ("conv_L_cache",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
}
"""Keys of every architecture, and the possible config fields for each key. The first field that the config
class has is used.
"""
CONSTANTS: dict[str, tuple[str, ...]] = {
    "attention.scale": ("attention_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor", "route_scale"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "residual_scale": ("residual_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Keys that some architectures compute with, and the config fields for each key. A config class has one of
these fields.
"""
_PRESENT = {
    "attention_bias": ("attn_q.bias", "attn_qkv.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "mamba_rms_norm": ("ssm_norm.weight",),
    "mlp_bias": ("ffn_up.bias",),
    "qk_layernorm": ("attn_q_norm.weight",),
    "use_bias": ("attn_q.bias",),
    "use_expert_bias": ("exp_probs_b.bias",),
    "use_qk_norm": ("attn_q_norm.weight",),
    "use_qkv_bias": ("attn_q.bias",),
}
"""Fields that are true if a layer has one of the tensors."""
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned")
"""Keys that do not affect the computation, unless a reader of the architecture uses them."""
_MAX_LAYERS = 1000
_READ_BY_LLAMA_CPP = ("xielu.", "diffusion.", "adapter.", "clip.")
"""Prefixes of keys that llama.cpp reads, although they do not begin with the name of an architecture.

Other such keys, which publishers add to files, have no effect.
"""
_TOKENIZER = {
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token"),
    *("add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"),
}
"""Keys of tokenizers that are read, or that do not affect the supported tokenizers."""
_CLOSE = 1e-4
"""Maximum relative difference at which a factor of Llama 3.1's scaling agrees with its parameters."""


def architecture_of(header: GgufHeader, path: Path) -> GgufArchitecture:
    """Return the properties of the file's architecture. Raises UserError naming an unknown architecture."""
    name = header.architecture
    architecture = ARCHITECTURES.get(name or "")
    if architecture is None:
        raise gguf_problem(
            path,
            f"its architecture {in_words(name)!r} cannot be trained from GGUF",
            why=f"Supported architectures: {', '.join(sorted(ARCHITECTURES))}.",
        )
    return MIXTRAL if name == "llama" and header.values.get("llama.expert_count") else architecture


def to_hf_config(header: GgufHeader, path: Path) -> Config:
    """Convert the header to the form of ``config.json``, for ``parse_architecture`` and for transformers.

    Raises UserError for an architecture that cannot be converted, and for a file with properties that the
    converted model would not have.
    """
    architecture = architecture_of(header, path)
    name = header.architecture
    assert name is not None
    data = Metadata(header, path, name)
    _check_file(data)
    config: Config = {"model_type": architecture.model_type, **architecture.computes}
    for key, config_field in COUNTS.items():
        if key not in architecture.by_layer and (count := data.count(key)) is not None:
            config[config_field] = count
    fields = config_class(architecture.model_type).defaults
    if not fields:
        raise data.problem(f"the installed transformers has no config class for {architecture.model_type}")
    for key in (*FIELDS, *architecture.constants):
        names = FIELDS.get(key) or CONSTANTS[key]
        config_field = next((each for each in names if each in fields), "")
        is_count = key in FIELDS and not key.endswith("epsilon")
        number = None
        if config_field:
            number = data.count(key) if is_count else data.number(key)
        if number is not None:
            config.setdefault(config_field, number)
    _check_needed(data, config)
    epsilons = [key for key in FIELDS if key.endswith("epsilon")]
    known = [config[name] for key in epsilons for name in FIELDS[key] if name in config]
    for key in epsilons if known else ():
        # llama.cpp computes with only one of the two keys, and some files have both, which must be equal.
        data.expect(key, *known)
    for config_field, parts in _PRESENT.items():
        if config_field in fields:
            config[config_field] = any(map(data.has_in_a_layer, parts))
    _read_heads(data, config, architecture)
    config["rope_parameters"] = _rope(data, config, architecture)
    for read in architecture.read:
        read(data, config)
    _no_windows(data, config)
    data.expect("attention.causal", True)
    for key in _IGNORED:
        data.value(key)
    data.finish()
    if (rows := header.vocab_size) is not None:
        config["vocab_size"] = rows
    config["tie_word_embeddings"] = not data.has("output.weight")
    config["dtype"] = header.quantization
    return config


def _check_file(data: Metadata) -> None:
    """Raise UserError if the file is a part of a model, contains no model, or has an unknown tokenizer."""
    files = data.header.values.get("split.count")
    if isinstance(files, int) and files > 1:
        raise data.problem(f"the rest of the model is in other files (split.count is {files})")
    kind = data.header.values.get("general.type", "model")
    if kind != "model":
        raise data.problem(f"it holds no model, but general.type {in_words(kind)!r}")
    for key in (*data.header.values, *data.header.lengths):
        part = key.removeprefix("tokenizer.ggml.")
        is_known = part == key or part in _TOKENIZER or part.endswith("_token_id")
        if key.startswith(_READ_BY_LLAMA_CPP) or not is_known:
            raise data.problem(f"{key} is not understood", lost=True)
    model, pre = (data.header.values.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is None:
        raise data.problem("it has no tokenizer (tokenizer.ggml.model)")
    if model not in ("gpt2", "llama", "gemma4"):
        raise data.problem(f"its tokenizer (tokenizer.ggml.model {in_words(model)!r}) is not understood")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise data.problem(
            f"how it splits text (tokenizer.ggml.pre {in_words(pre)!r}) is not understood", lost=True
        )


def _check_needed(data: Metadata, config: Config) -> None:
    for key in ("block_count", "embedding_length", "attention.head_count"):
        if COUNTS[key] not in config:
            raise data.problem(f"{COUNTS[key]} is missing ({data.architecture}.{key})")
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise data.problem(f"{data.architecture}.block_count is {config['num_hidden_layers']:,}")
    if config["num_attention_heads"] > config["hidden_size"]:
        raise data.problem(f"{data.architecture}.attention.head_count is more than embedding_length")


def _read_heads(data: Metadata, config: Config, architecture: GgufArchitecture) -> None:
    """Read the width of a head, and refuse a different width of values or another scale of attention."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    width = data.count("attention.key_length") or usual
    if data.architecture == "llama" and "llama.attention.key_length" not in data.header.values:
        # Files of 2024 have the width of a head only under this key (src/llama-model.cpp requires both to be
        # equal).
        width = data.count("rope.dimension_count") or usual
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = width
    if "attention.value_length" not in architecture.by_layer:
        data.expect("attention.value_length", width)
    if "attention.scale" not in architecture.constants:
        data.expect("attention.scale", width**-0.5, 0.0)


def _no_windows(data: Metadata, config: Config) -> None:
    """Refuse a window shorter than the context if transformers' class or llama.cpp does not support it."""
    if "sliding_window" in config or "layer_types" in config:
        return
    window = data.count("attention.sliding_window")
    if window and window < config.get("max_position_embeddings", math.inf):
        raise data.problem(f"{data.architecture}.attention.sliding_window is {window:,}", lost=True)


_ROPE_BASE = 10_000.0
"""Base of llama.cpp's rotary embedding if a file sets none."""


def _rope(data: Metadata, config: Config, architecture: GgufArchitecture) -> Config:
    """Return ``rope_parameters``. Raises UserError for an embedding that transformers cannot compute."""
    parameters: Config = {
        "rope_type": "default",
        "rope_theta": data.positive("rope.freq_base") or _ROPE_BASE,
    }
    width: int = config["head_dim"]
    rotated = data.count("rope.dimension_count") or width
    if "rope.dimension_count" in architecture.by_layer:
        rotated = width
    if rotated != width and (not architecture.partial_rotation or rotated > width or rotated % 2):
        data.expect("rope.dimension_count", width)
    if architecture.partial_rotation:
        # Set even if it is 1, because some classes rotate only a part by default.
        parameters["partial_rotary_factor"] = rotated / width
    kind = data.text("rope.scaling.type")
    factor = data.positive("rope.scaling.factor") or data.positive("rope.scale_linear") or 1.0
    original = data.count("rope.scaling.original_context_length")
    attention = data.positive("rope.scaling.attn_factor") or 1.0
    factors = data.header.rope_factors
    context: int = config.get("max_position_embeddings") or 0
    if data.has("rope_factors_long.weight") or data.has("rope_factors_short.weight"):
        longrope = _longrope(data, factors, context, original or context, attention)
        config["original_max_position_embeddings"] = longrope["original_max_position_embeddings"]
        return parameters | longrope
    if kind == "longrope":
        raise data.problem("it has no rope_factors_long.weight, which its rope.scaling.type longrope needs")
    if data.has("rope_freqs.weight") and not architecture.reads_factors:
        if kind not in (None, "none", "linear") or factor != 1.0 or attention != 1.0:
            raise data.problem(
                f"it has rope_freqs.weight and rope.scaling.type {in_words(kind)!r}", lost=True
            )
        return parameters | _llama3(data, factors, parameters["rope_theta"], rotated)
    if kind in (None, "none", "linear"):
        data.expect("rope.scaling.attn_factor", 1.0, 0.0)
        if factor == 1.0 or kind == "none":
            return parameters
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return parameters | _yarn(data, factor, original or context, attention)
    raise data.problem(f"its rope.scaling.type {in_words(kind)!r} is not understood", lost=True)


def _yarn(data: Metadata, factor: float, original: int, attention: float) -> Config:
    """Return the parameters of YaRN. llama.cpp multiplies the file's attention factor by the paper's."""
    data.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    data.expect("rope.scaling.yarn_attn_factor", 1.0, 0.0)
    parameters: Config = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": data.positive("rope.scaling.yarn_beta_fast") or 32.0,
        "beta_slow": data.positive("rope.scaling.yarn_beta_slow") or 1.0,
    }
    if attention != 1.0:
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return parameters


def _longrope(
    data: Metadata,
    factors: Mapping[str, Sequence[float]],
    context: int,
    original: int,
    attention: float,
) -> Config:
    lists: Config = {}
    for length in ("long", "short"):
        values = factors.get(f"rope_factors_{length}.weight")
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise data.problem(f"rope_factors_{length}.weight is not a list of positive float32 numbers")
        lists[f"{length}_factor"] = [shortest(value) for value in values]
    parameters: Config = {"rope_type": "longrope", **lists, "original_max_position_embeddings": original}
    scale = context / original if original else 1.0
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 and original > 1 else 1.0
    if not is_same(attention, usual):
        parameters["attention_factor"] = attention
    return parameters


def _llama3(data: Metadata, factors: Mapping[str, Sequence[float]], base: float, rotated: int) -> Config:
    """Find the parameters of Llama 3.1's scaling that give the file's factors.

    The divisor of a frequency is 1 for a wavelength below ``original / high``, and ``factor`` above
    ``original / low``. In between it is interpolated: 1 / divisor = (1 - s) / factor + s with s = (original /
    wavelength - low) / (high - low) (transformers, modeling_rope_utils.py). So s is linear in 1 / wavelength,
    and its two coefficients follow from the factors; ``low`` is 1 in all published models.
    """
    values = factors.get("rope_freqs.weight", ())
    if len(values) != rotated // 2 or not all(math.isfinite(v) and v >= 1 for v in values):
        raise data.problem("rope_freqs.weight is not a factor of at least 1 for each frequency", lost=True)
    wavelengths = [2 * math.pi * base ** (2 * i / rotated) for i in range(rotated // 2)]
    factor = shortest(max(values))
    if factor == 1:
        return {}
    # Points of the line between its two ends.
    points = [
        (1 / wavelength, (1 / value - 1 / factor) / (1 - 1 / factor))
        for wavelength, value in zip(wavelengths, values, strict=True)
        if 1 + _CLOSE < value < factor * (1 - _CLOSE)
    ]
    candidates = [(1.0, 4.0, 8192)]
    if len(points) > 1 and points[0][0] != points[-1][0]:
        (first_x, first_s), (last_x, last_s) = points[0], points[-1]
        slope = (first_s - last_s) / (first_x - last_x)
        shift = slope * first_x - first_s
        if slope > 0 and shift > 0:
            high = shortest(float(f"{(1 + shift) / shift:.4g}"))
            candidates.insert(0, (1.0, high, round(slope * (high - 1))))
    for low, high, original in candidates:
        parameters = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if all(
            math.isclose(llama3_factor(wavelength, factor, low, high, original), value, rel_tol=_CLOSE)
            for wavelength, value in zip(wavelengths, values, strict=True)
        ):
            return parameters
    raise data.problem("rope_freqs.weight does not scale as Llama 3.1 does", lost=True)


def llama3_factor(wavelength: float, factor: float, low: float, high: float, original: int) -> float:
    """Return the divisor of a frequency in Llama 3.1's scaling, given its wavelength."""
    share = (original / wavelength - low) / (high - low)
    share = min(1.0, max(0.0, share))
    return 1 / ((1 - share) / factor + share)
