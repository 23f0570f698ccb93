"""The GGUF architectures that a base may have, with the conversion of their metadata to config fields.

Each reader below converts the metadata of one feature. Metadata that all architectures share is converted
in :mod:`qlora_tui.catalog.gguf_config`, and tensors in :mod:`qlora_tui.gguf_format`. Source of the
keys and defaults of each architecture: llama.cpp, src/models (``load_arch_hparams``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qlora_tui.catalog.gguf_metadata import Metadata, shortest
from qlora_tui.gguf_format.computed_keys import GATES, GEMMA_27B, rope_but_every_fourth

Config: TypeAlias = dict[str, Any]
Reader: TypeAlias = Callable[[Metadata, Config], None]
_SOFTMAX, _SIGMOID = GATES["softmax"], GATES["sigmoid"]
_ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class GgufArchitecture:
    """The properties of one ``general.architecture`` beyond those that all share."""

    model_type: str
    """transformers' name of the architecture."""
    constants: tuple[str, ...] = ()
    """Keys of ``CONSTANTS`` in :mod:`qlora_tui.catalog.gguf_config` that the architecture computes with."""
    computes: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that the file does not contain, with the values that llama.cpp's computation implies. A
    field is listed if transformers' default might differ.
    """
    partial_rotation: bool = False
    """Whether transformers' class can rotate only a part of a head."""
    by_layer: tuple[str, ...] = ()
    """Keys that only ``read`` reads, because their values may differ between layers."""
    reads_factors: bool = False
    """Whether ``read`` reads the factors of the rotary embedding's frequencies."""
    read: tuple[Reader, ...] = ()
    """Readers of all other metadata."""


def _scaled_attention(data: Metadata, config: Config) -> None:
    """Read Gemma's attention scale. 27B models are recognized by their number of layers
    (src/models/gemma2.cpp).
    """
    width: int = config["head_dim"]
    if config["num_hidden_layers"] == GEMMA_27B[data.architecture]:
        width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width


def _windows(period: int, window: int | None = None) -> Reader:
    """Return a reader of the window, and of the layers that have one.

    If the file has no pattern, all layers except every ``period``-th one have a window. ``window`` is the
    width that llama.cpp uses if the file has none.
    """

    def read(data: Metadata, config: Config) -> None:
        layers: int = config["num_hidden_layers"]
        width = data.count("attention.sliding_window") or window
        pattern = data.value("attention.sliding_window_pattern")
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
        if isinstance(pattern, tuple):
            if len(pattern) < layers or any(each not in (0, 1) for each in pattern):
                raise data.problem(
                    f"{data.architecture}.attention.sliding_window_pattern is not one flag per layer"
                )
            sliding = [bool(each) for each in pattern[:layers]]
        elif pattern is not None:
            every = data.count("attention.sliding_window_pattern")
            sliding = [every is None or (layer + 1) % every != 0 for layer in range(layers)]
        if width is None:
            sliding = [False] * layers
        config["layer_types"] = ["sliding_attention" if each else "full_attention" for each in sliding]
        if width is not None:
            config["sliding_window"] = width

    return read


def _rope_by_window(base: float | None = _ROPE_BASE) -> Reader:
    """Return a reader of the rotary embedding of layers with a window. This embedding is never scaled.

    ``base`` is the base of the embedding if the file sets none; None means the base of the other layers.
    """

    def read(data: Metadata, config: Config) -> None:
        full = config["rope_parameters"]
        theta = data.positive("rope.freq_base_swa") or base or full["rope_theta"]
        sliding = {"rope_type": "default", "rope_theta": theta}
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}

    return read


def _one_window(data: Metadata, config: Config) -> None:
    """Read the window of all layers, as in Phi-3."""
    config["sliding_window"] = data.count("attention.sliding_window")


def _softcaps(data: Metadata, config: Config) -> None:
    """Read Gemma 2's soft caps; llama.cpp's defaults are those of the published models."""
    for key, cap in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        config[key] = data.positive(key) or cap


def _last_softcap(data: Metadata, config: Config) -> None:
    """Read the soft cap of the logits; 0 means none."""
    config["final_logit_softcapping"] = data.positive("final_logit_softcapping")


def _routing(gate: int | None = _SOFTMAX, normalized: bool | None = None, scale: str = "") -> Reader:
    """Return a reader of how a token's experts are selected and weighted.

    Args:
        gate: the only supported function of the router's logits; None if another reader reads it.
        normalized: whether the weights must be divided by their sum; None if a config field determines this.
        scale: config field of the factor on the experts' sum; empty if no factor is supported.
    """

    def read(data: Metadata, config: Config) -> None:
        if gate is not None:
            data.expect("expert_gating_func", gate, *((0,) if gate == _SOFTMAX else ()))
        if normalized is not None:
            data.expect("expert_weights_norm", normalized)
        else:
            config["norm_topk_prob"] = bool(data.value("expert_weights_norm"))
        if scale:
            config[scale] = data.positive("expert_weights_scale") or 1.0
        else:
            data.expect("expert_weights_scale", 1.0, 0.0)
        if "n_group" not in config:
            data.expect("expert_group_count", 1, 0)
            data.expect("expert_group_used_count", 1, 0)

    return read


def _widths(own: str, shared: str = "") -> Reader:
    """Return a reader of two widths: that of one expert, and that of all shared experts together."""

    def read(data: Metadata, config: Config) -> None:
        used = max(1, config.get("num_experts_per_tok", 1))
        width = data.count("expert_feed_forward_length")
        config[own] = width or config.get("intermediate_size", 0) // (
            1 if own == "intermediate_size" else used
        )
        together = data.count("expert_shared_feed_forward_length")
        if shared:
            config[shared] = together or config.get("intermediate_size")
        elif together is not None:
            data.expect(
                "expert_shared_feed_forward_length", config[own] * (config.get("n_shared_experts") or 1)
            )

    return read


def _unrotated_layers(data: Metadata, config: Config) -> None:
    """Mark every fourth layer of SmolLM3 as having no rotary embedding."""
    config["no_rope_layers"] = rope_but_every_fourth(config["num_hidden_layers"])


def _olmo3(data: Metadata, config: Config) -> None:
    """Read Olmo 3, which is Olmo 2 with windows; layers with windows have unscaled rotary embeddings."""
    if not data.header.values.get("olmo2.attention.sliding_window"):
        data.count("attention.sliding_window")
        return
    config["model_type"] = "olmo3"
    _windows(period=4)(data, config)
    _rope_by_window(None)(data, config)


def _ministral(data: Metadata, config: Config) -> None:
    """Read Ministral 3's factors for YaRN, and for queries far from the beginning."""
    rope = config["rope_parameters"]
    multiplier = data.positive("rope.scaling.yarn_log_multiplier")
    rope["llama_4_scaling_beta"] = data.number("attention.temperature_scale") or 0.0
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    data.expect("attention.temperature_length", rope["original_max_position_embeddings"])
    if multiplier is not None:
        rope |= {"mscale": 1.0, "mscale_all_dim": multiplier}


def _inner_size_and_heads(data: Metadata) -> tuple[int, int]:
    inner, heads = data.count("ssm.inner_size"), data.count("ssm.time_step_rank")
    if inner is None or heads is None:
        raise data.problem(f"{data.architecture}.ssm.inner_size or ssm.time_step_rank is missing")
    return inner, heads


def _linear_attention(data: Metadata, config: Config) -> None:
    """Read the layers with a state (gated delta net) of Qwen3-Next and Qwen3.5."""
    layers: int = config["num_hidden_layers"]
    inner, heads = _inner_size_and_heads(data)
    config["linear_num_value_heads"], config["linear_value_head_dim"] = heads, inner // heads
    every = data.count("full_attention_interval") or 4
    recurrent = data.value("attention.recurrent_layers")
    kinds = [(layer + 1) % every != 0 for layer in range(layers)]
    if isinstance(recurrent, tuple) and len(recurrent) >= layers:
        kinds = [bool(each) for each in recurrent[:layers]]
    config["layer_types"] = ["linear_attention" if each else "full_attention" for each in kinds]
    sections = data.value("rope.dimension_sections")
    if isinstance(sections, tuple) and any(sections):
        # Shares of the rotated pairs for time, height and width; for text, all three are the token's
        # position.
        config["rope_parameters"] |= {"mrope_section": list(sections[:3]), "mrope_interleaved": True}


def _later_tokens(data: Metadata, config: Config) -> None:
    """Leave out the layers for multi-token prediction at the end, which transformers' class does not have."""
    extra = data.count("nextn_predict_layers") or 0
    if extra >= config["num_hidden_layers"]:
        raise data.problem(f"{data.architecture}.nextn_predict_layers is {extra:,}")
    config["num_hidden_layers"] -= extra


def _dense_first(field_name: str) -> Reader:
    """Return a reader of the number of layers at the beginning that have no experts."""

    def read(data: Metadata, config: Config) -> None:
        config[field_name] = data.count("leading_dense_block_count") or 0

    return read


def _kinds_by_key_heads(without: str) -> Reader:
    """Return a reader of layer kinds. Layers with key heads have attention; all others are of the kind
    ``without``.
    """

    def read(data: Metadata, config: Config) -> None:
        heads = data.value("attention.head_count_kv")
        layers: int = config["num_hidden_layers"]
        counts = heads[:layers] if isinstance(heads, tuple) else ()
        if len(counts) < layers or not _are_counts(counts) or len({*counts} - {0}) > 1:
            raise data.problem(f"{data.architecture}.attention.head_count_kv is not one number per layer")
        config["num_key_value_heads"] = max(counts) or config["num_attention_heads"]
        config["layer_types"] = ["full_attention" if each else without for each in counts]

    return read


def _are_counts(values: tuple[Any, ...]) -> bool:
    """Return whether all values are integers of at least zero."""
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values)


def _by_layer(data: Metadata, key: str, layers: int) -> tuple[int, ...]:
    """Return a number for each layer; the file may have one number for all. Raises UserError."""
    value = data.value(key)
    values = value[:layers] if isinstance(value, tuple) else (value,) * layers
    if len(values) < layers or not _are_counts(values):
        raise data.problem(f"{data.architecture}.{key} is not one number per layer")
    return values


def _mamba2(data: Metadata, config: Config) -> None:
    """Read the sizes of Mamba-2 layers."""
    inner, heads = _inner_size_and_heads(data)
    config |= {"mamba_n_heads": heads, "mamba_d_head": inner // heads}
    config["mamba_expand"] = inner // config["hidden_size"]


def _granite_hybrid(data: Metadata, config: Config) -> None:
    """Read whether Granite 4 has rotary embeddings and experts, and the widths of its MLPs."""
    finetuned = data.value("rope.scaling.finetuned")
    config["position_embedding_type"] = "rope" if finetuned in (None, True) else None
    config["shared_intermediate_size"] = data.count("expert_shared_feed_forward_length") or config.get(
        "intermediate_size", 0
    )
    width = data.count("expert_feed_forward_length")
    if "num_local_experts" not in config:
        config |= {"num_local_experts": 0, "num_experts_per_tok": 0}
    elif width is not None:
        config["intermediate_size"] = width


def _granite_shared(data: Metadata, config: Config) -> None:
    """Read Granite's experts. In transformers, a model with shared experts has a type of its own."""
    shared = data.count("expert_shared_feed_forward_length")
    if shared is not None:
        config |= {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    if (width := data.count("expert_feed_forward_length")) is not None:
        config["intermediate_size"] = width


def _gemma4(data: Metadata, config: Config) -> None:
    """Read Gemma 4: heads of layers without a window, shared keys, and embeddings of each layer."""
    layers: int = config["num_hidden_layers"]
    full, sliding = config["head_dim"], data.count("attention.key_length_swa") or config["head_dim"]
    data.expect("attention.value_length_swa", sliding)
    data.expect("rope.dimension_count_swa", sliding)
    config |= {"head_dim": sliding, "global_head_dim": full}
    _windows(period=6)(data, config)
    is_full = [kind == "full_attention" for kind in config["layer_types"]]
    heads = _by_layer(data, "attention.head_count_kv", layers)
    by_kind = [
        {count for count, kind in zip(heads, is_full, strict=True) if kind is each} for each in (False, True)
    ]
    if any(len(each) > 1 for each in by_kind) or not by_kind[0]:
        raise data.problem("gemma4.attention.head_count_kv differs between layers of one kind")
    config["num_key_value_heads"] = by_kind[0].pop()
    if by_kind[1] and (count := by_kind[1].pop()) != config["num_key_value_heads"]:
        config["num_global_key_value_heads"] = count
    first_full = is_full.index(True) if any(is_full) else 0
    config["attention_k_eq_v"] = any(is_full) and not data.has(f"blk.{first_full}.attn_v.weight")
    widths = _by_layer(data, "feed_forward_length", layers)
    shared = min(data.count("attention.shared_kv_layers") or 0, layers)
    config["num_kv_shared_layers"] = shared
    own, last = {*widths[: layers - shared]}, {*widths[layers - shared :]}
    if len(own) != 1 or len(last) > 1:
        raise data.problem("gemma4.feed_forward_length differs between layers that share keys or do not")
    config["intermediate_size"] = own.pop()
    double = bool(last) and last == {2 * config["intermediate_size"]}
    if last and not double and last != {config["intermediate_size"]}:
        raise data.problem("gemma4.feed_forward_length is neither the first value nor twice the first value")
    config["use_double_wide_mlp"] = double
    config["hidden_size_per_layer_input"] = data.count("embedding_length_per_layer_input") or 0
    table = data.header.tensors.get("per_layer_token_embd.weight")
    if table is not None:
        config["vocab_size_per_layer_input"] = table[1]
    width = data.count("expert_feed_forward_length")
    config["enable_moe_block"] = width is not None
    if width is not None:
        config["moe_intermediate_size"] = width
    base = data.positive("rope.freq_base") or _ROPE_BASE
    config["rope_parameters"] = {
        "full_attention": _proportional(data, base, full),
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": data.positive("rope.freq_base_swa") or _ROPE_BASE,
        },
    }


def _proportional(data: Metadata, base: float, width: int) -> Config:
    """Return the parameters of a rotary embedding that rotates only some of the pairs.

    Infinite factors in the file mark the pairs that are not rotated.
    """
    factors = data.header.rope_factors.get("rope_freqs.weight", ())
    rotated = sum(factor == 1.0 for factor in factors)
    ends = factors[rotated:]
    if len(factors) != width // 2 or any(f != 1.0 for f in factors[:rotated]) or any(f < 1e20 for f in ends):
        raise data.problem("rope_freqs.weight is not 1 for the first pairs and infinite for the others")
    return {"rope_type": "proportional", "rope_theta": base, "partial_rotary_factor": 2 * rotated / width}


def _fixed_epsilon(data: Metadata, config: Config) -> None:
    """Refuse an epsilon other than 1e-5, which transformers' class always uses for norms without weights."""
    data.expect("attention.layer_norm_epsilon", 1e-5)


def _dense_width(data: Metadata, config: Config) -> None:
    """Read the width of the first layers, which have no experts."""
    config["intermediate_size"] = _by_layer(data, "feed_forward_length", config["num_hidden_layers"])[0]


def _parallel_residual(data: Metadata, config: Config) -> None:
    """Read whether attention and MLP of a layer have the same input. If no key says so, infer it from the
    norms.
    """
    named = data.value("use_parallel_residual")
    both = data.has_in_a_layer("ffn_norm.weight")
    config["use_parallel_residual"] = not both if named is None else bool(named)


def _latent_attention(data: Metadata, config: Config) -> None:
    """Read DeepSeek's latent attention, which is stored with one key head.

    It is the same in DeepSeek-V2 and V3, but V2 selects experts by a softmax, and V3 by a sigmoid.
    """
    heads, rotated = config["num_attention_heads"], data.count("rope.dimension_count")
    key, value = data.count("attention.key_length_mla"), data.count("attention.value_length_mla")
    rank = data.count("attention.kv_lora_rank")
    if rotated is None or key is None or value is None or rank is None or key <= rotated:
        raise data.problem("deepseek2.attention.key_length_mla or another size of its attention is missing")
    data.expect("attention.head_count_kv", 1)
    data.expect("attention.key_length", rank + rotated)
    data.expect("attention.value_length", rank)
    config |= {"num_key_value_heads": heads, "kv_lora_rank": rank, "v_head_dim": value, "head_dim": rotated}
    config |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": key - rotated}
    config["q_lora_rank"] = data.count("attention.q_lora_rank")
    rope = config["rope_parameters"]
    # llama.cpp's key is a tenth of the factor (conversion of DeepSeek-V2).
    if (multiplier := data.positive("rope.scaling.yarn_log_multiplier")) is not None:
        rope |= {"mscale": shortest(10 * multiplier), "mscale_all_dim": shortest(10 * multiplier)}
    gate = data.value("expert_gating_func")
    config["model_type"] = "deepseek_v3" if gate == _SIGMOID else "deepseek_v2"
    config["n_group"] = data.count("expert_group_count") or 1
    config["topk_group"] = data.count("expert_group_used_count") or 1
    if config["model_type"] == "deepseek_v2":
        config["topk_method"] = "greedy" if config["n_group"] == 1 else "group_limited_greedy"


def _blocks(data: Metadata, config: Config) -> None:
    """Read which of four kinds each layer of Nemotron H is, from its tensors."""
    kinds = {
        "ssm_in.weight": "linear_attention",
        "attn_q.weight": "full_attention",
        "ffn_up_exps.weight": "moe",
        "ffn_up.weight": "mlp",
    }
    layers = range(config["num_hidden_layers"])
    config["layers_block_type"] = [
        next((kind for part, kind in kinds.items() if data.has(f"blk.{layer}.{part}")), "mlp")
        for layer in layers
    ]
    for key, config_field in (
        ("attention.head_count_kv", "num_key_value_heads"),
        ("feed_forward_length", "intermediate_size"),
    ):
        sizes = {0} if data.peek(key) is None else {*_by_layer(data, key, len(layers))}
        if len(sizes - {0}) > 1:
            raise data.problem(f"{data.architecture}.{key} differs between layers of one kind")
        if size := max(sizes):
            config[config_field] = size
    inner, count = data.count("ssm.inner_size"), data.count("ssm.time_step_rank")
    if inner is not None and count is not None:
        config |= {"mamba_num_heads": count, "mamba_head_dim": inner // count}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])


def _folded_factors(data: Metadata, config: Config) -> None:
    """Set all of Falcon H1's factors to 1, because the file's weights are already multiplied by them."""
    names = ("lm_head", "embedding", "key", "attention_out", "attention_in", "ssm_in", "ssm_out")
    config |= {f"{name}_multiplier": 1.0 for name in names}
    config |= {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
    config["mamba_d_ssm"] = config["mamba_d_head"] * config["mamba_n_heads"]


def _gpt_oss(data: Metadata, config: Config) -> None:
    """Read gpt-oss. Its YaRN does not round the limits of the ramp, but no key of the file says so."""
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False


_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_TANH = {"hidden_activation": "gelu_pytorch_tanh"}
_DELTA_NET = (_linear_attention,)
_MOE = (_routing(normalized=True), _widths("moe_intermediate_size", "shared_expert_intermediate_size"))

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama"),
    "arcee": GgufArchitecture("arcee"),
    "smollm3": GgufArchitecture("smollm3", read=(_unrotated_layers,)),
    "mistral3": GgufArchitecture("ministral3", read=(_ministral,)),
    "granite": GgufArchitecture("granite", constants=_SCALES),
    "granitemoe": GgufArchitecture(
        "granitemoe", constants=_SCALES, read=(_routing(normalized=True), _granite_shared)
    ),
    "granitehybrid": GgufArchitecture(
        "granitemoehybrid",
        constants=_SCALES,
        by_layer=("attention.head_count_kv",),
        read=(_routing(normalized=True), _kinds_by_key_heads("linear_attention"), _mamba2, _granite_hybrid),
    ),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "qwen2moe": GgufArchitecture(
        "qwen2_moe",
        computes=_EVERY_LAYER | {"norm_topk_prob": False},
        read=(
            _routing(normalized=False),
            _widths("moe_intermediate_size", "shared_expert_intermediate_size"),
        ),
    ),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe",
        computes=_EVERY_LAYER | {"norm_topk_prob": True},
        read=(_routing(normalized=True), _widths("moe_intermediate_size")),
    ),
    "qwen3next": GgufArchitecture(
        "qwen3_next",
        computes=_EVERY_LAYER | {"norm_topk_prob": True},
        partial_rotation=True,
        read=(_later_tokens, *_DELTA_NET, *_MOE),
    ),
    "qwen35": GgufArchitecture("qwen3_5_text", partial_rotation=True, read=(_later_tokens, *_DELTA_NET)),
    "qwen35moe": GgufArchitecture(
        "qwen3_5_moe_text", partial_rotation=True, read=(_later_tokens, *_DELTA_NET, *_MOE)
    ),
    "phi3": GgufArchitecture("phi3", partial_rotation=True, read=(_one_window,)),
    "phi2": GgufArchitecture("phi", partial_rotation=True),
    "gemma": GgufArchitecture("gemma", computes=_TANH),
    "gemma2": GgufArchitecture(
        "gemma2", computes=_TANH, read=(_scaled_attention, _windows(2, 4096), _softcaps)
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text", computes=_TANH, read=(_scaled_attention, _windows(6), _rope_by_window(), _last_softcap)
    ),
    "gemma4": GgufArchitecture(
        "gemma4_text",
        computes=_TANH,
        by_layer=("attention.head_count_kv", "feed_forward_length"),
        reads_factors=True,
        read=(_gemma4, _routing(normalized=True), _last_softcap),
    ),
    "olmo": GgufArchitecture("olmo", constants=("attention.clamp_kqv",), read=(_fixed_epsilon,)),
    "olmo2": GgufArchitecture("olmo2", read=(_olmo3,)),
    "olmoe": GgufArchitecture(
        "olmoe",
        computes={"norm_topk_prob": False},
        read=(_routing(normalized=False), _widths("intermediate_size")),
    ),
    "chatglm": GgufArchitecture("glm", partial_rotation=True),
    "glm4": GgufArchitecture("glm4", partial_rotation=True),
    "glm4moe": GgufArchitecture(
        "glm4_moe",
        partial_rotation=True,
        read=(
            _later_tokens,
            _dense_first("first_k_dense_replace"),
            _routing(_SIGMOID, scale="routed_scaling_factor"),
            _widths("moe_intermediate_size"),
        ),
    ),
    "dots1": GgufArchitecture(
        "dots1",
        read=(
            _dense_first("first_k_dense_replace"),
            _routing(_SIGMOID, scale="routed_scaling_factor"),
            _widths("moe_intermediate_size"),
        ),
    ),
    "minimax-m2": GgufArchitecture(
        "minimax_m2",
        partial_rotation=True,
        read=(_routing(_SIGMOID, normalized=True), _widths("intermediate_size")),
    ),
    "gpt-oss": GgufArchitecture(
        "gpt_oss", read=(_windows(2), _routing(normalized=True), _widths("intermediate_size"), _gpt_oss)
    ),
    "lfm2": GgufArchitecture(
        "lfm2",
        computes={"block_auto_adjust_ff_dim": False},
        by_layer=("attention.head_count_kv",),
        read=(_kinds_by_key_heads("conv"),),
    ),
    "lfm2moe": GgufArchitecture(
        "lfm2_moe",
        computes={"norm_topk_prob": True},
        by_layer=("attention.head_count_kv", "feed_forward_length"),
        read=(
            _kinds_by_key_heads("conv"),
            _dense_width,
            _dense_first("num_dense_layers"),
            _routing(_SIGMOID, normalized=True, scale="routed_scaling_factor"),
            _widths("moe_intermediate_size"),
        ),
    ),
    "deepseek2": GgufArchitecture(
        "deepseek_v3",
        by_layer=(
            *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
            *("rope.dimension_count", "expert_group_count", "expert_group_used_count"),
        ),
        read=(
            _later_tokens,
            _latent_attention,
            _dense_first("first_k_dense_replace"),
            _routing(None, scale="routed_scaling_factor"),
            _widths("moe_intermediate_size"),
        ),
    ),
    "nemotron_h": GgufArchitecture(
        "nemotron_h", by_layer=("attention.head_count_kv", "feed_forward_length"), read=(_blocks,)
    ),
    "nemotron_h_moe": GgufArchitecture(
        "nemotron_h",
        by_layer=("attention.head_count_kv", "feed_forward_length"),
        read=(
            _blocks,
            _routing(_SIGMOID, scale="routed_scaling_factor"),
            _widths("moe_intermediate_size", "moe_shared_expert_intermediate_size"),
        ),
    ),
    "falcon-h1": GgufArchitecture("falcon_h1", read=(_mamba2, _folded_factors)),
    "seed_oss": GgufArchitecture("seed_oss"),
    "ernie4_5": GgufArchitecture("ernie4_5"),
    "command-r": GgufArchitecture("cohere", constants=("logit_scale",)),
    "cohere2": GgufArchitecture("cohere2", constants=("logit_scale",), read=(_windows(4),)),
    "stablelm": GgufArchitecture("stablelm", partial_rotation=True, read=(_parallel_residual,)),
    "nemotron": GgufArchitecture("nemotron", partial_rotation=True),
    "gptneox": GgufArchitecture("gpt_neox", partial_rotation=True, read=(_parallel_residual,)),
    "hunyuan-dense": GgufArchitecture("hunyuan_v1_dense"),
    "starcoder2": GgufArchitecture("starcoder2", computes={"hidden_act": "gelu_pytorch_tanh"}),
}
"""The architectures whose weights can be converted exactly to those of transformers, keyed by
``general.architecture``.

Each one is compared with llama.cpp (tests/export/test_gguf_architectures.py).
"""
MIXTRAL = GgufArchitecture("mixtral", read=(_routing(normalized=True), _widths("intermediate_size")))
"""A ``llama`` architecture with experts."""
