"""Derives an approximate architecture of any model from the keys that configs share, without torch.

This takes milliseconds. The outline is used until the exact architecture is read from transformers' class
(:mod:`.described`). Sizes are those of the file, or the defaults of the config class; the modules of a layer
follow from the keys that exist. Biases and parameters of unusual blocks may be missing, and modules that LoRA
adapts may have other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_tui.catalog.architecture_types import (
    Architecture,
    Embedding,
    Experts,
    LinearModule,
    OutputHead,
    Parameter,
    Part,
)
from qlora_tui.catalog.config_fields import ConfigFields, size_bound, stored_as
from qlora_tui.catalog.library_types import ConfigClass, config_class, text_generators

NESTED = ("text_config", "language_config", "llm_config", "decoder", "generator")
"""Keys of the language model's config inside the config of a model of several parts."""

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "block_ff_dim", "d_ff")
_POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "num_experts_per_token")
_EXPERT_INNER = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
_SHARED_INNER = (
    "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip
_SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "first_k_dense_layers")
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
_GATED = frozenset(("silu", "swish", "swiglu", "gelu_pytorch_tanh"))
_ATTENDS = re.compile(r"(?<!linear_)(?<!gated_)attention")
_ONE_BLOCK = {
    kind: frozenset((block,))
    for block, kinds in {
        "mixer": ("M", "mamba"),
        "attention": ("*", "attention"),
        "mlp": ("-", "mlp"),
        "experts": ("E", "moe"),
    }.items()
    for kind in kinds
}
"""The only part of a layer in models such as Nemotron-H, keyed by the letter in a pattern or the name in a
list that stands for the layer.
"""
_ALL = frozenset(("attention", "mlp", "experts"))
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")


def read_outline(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Return the approximate architecture of a parsed ``config.json``.

    Raises UserError, naming the field, for a size that is missing or invalid.
    """
    return _Outline(config, where).architecture()


class _Outline:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        outer = ConfigFields(config, where)
        self.model_type = outer.text(("model_type",)) or ""
        nested = next((key for key in NESTED if isinstance(config.get(key), dict)), None)
        text = outer.child(nested) if nested else outer
        inner_type = text.text(("model_type",)) if nested else None
        self.known: ConfigClass = config_class(
            inner_type or config_class(self.model_type).text or self.model_type
        )
        self.is_nested = nested is not None
        classes = text_generators()
        self.loads_text_alone = bool(
            classes.get(self.model_type, frozenset()) & classes.get(inner_type or "", frozenset())
        )
        self.outer = config
        self.file = text
        merged = {**self.known.defaults, **{k: v for k, v in text.values.items() if v is not None}}
        self.fields = ConfigFields(merged, text.where)
        self.modules: list[LinearModule] = []
        self.parameters: list[Parameter] = []

    def size(self, keys: tuple[str, ...]) -> int | None:
        """Return the size under the first of these keys in the file, or else in the class's defaults."""
        own = tuple(self.known.attribute_map[key] for key in keys if key in self.known.attribute_map)
        for fields in (self.file, self.fields):
            for key in (*own, *keys):
                given = fields.values.get(key)
                by_class = isinstance(given, str) and given == self.known.defaults.get(key)  # "auto"
                if by_class or isinstance(given, list):  # one size for each layer
                    continue
                if (value := fields.size((key,), minimum=0)) is not None:
                    return value
        return None

    def needed(self, keys: tuple[str, ...]) -> int:
        value = self.size(keys)
        given = next((key for key in keys if self.file.values.get(key) is not None), None)
        if value is None and given is None:
            raise self.file.missing(keys[0])
        if value is None or value < 1:
            raise self.file.invalid(given or keys[0], "a whole number from 1")
        return value

    def architecture(self) -> Architecture:
        fields = self.fields
        kinds = self._kinds()
        layers, hidden = len(kinds), self.needed(_HIDDEN)
        heads = self.size(_HEADS) or 0
        vocab = self.needed(("vocab_size",))
        head_dim = self.size(("head_dim", "kv_channels")) or (hidden // heads if heads else 0)
        if rope := self.size(("qk_rope_head_dim",)):
            head_dim = (self.size(("qk_nope_head_dim",)) or 0) + rope
        kv_heads = self._kv_heads(heads)
        inner = self._inner(hidden)
        experts = self._experts(hidden)
        activation = next(
            (fields.values[k] for k in _ACTIVATIONS if isinstance(fields.values.get(k), str)), ""
        )
        gated = self._is_gated(activation)
        for index in range(layers):
            self._add_layer(
                index, layers, kinds[index], hidden, heads, kv_heads, head_dim, inner, experts, gated
            )
        self.parameters.append(Parameter("model.norm.weight", "norm", None, (hidden,)))
        self._add_tower(hidden)
        tied = self._tied()
        embeddings = [Embedding("model.embed_tokens", vocab, hidden)]
        positions = self.size(_POSITIONS)
        if per_layer := self.size(("hidden_size_per_layer_input",)):
            rows = self.size(("vocab_size_per_layer_input",)) or vocab
            embeddings.append(Embedding("model.embed_tokens_per_layer", rows, per_layer * layers))
            projection = _linear(
                "model.per_layer_model_projection", "other", None, hidden, per_layer * layers
            )
            self.modules.append(projection)
        names = ("dtype", "torch_dtype")
        dtype = self.file.text(names) or ConfigFields(self.outer, "config.json").text(names)
        return Architecture(
            model_type=self.model_type,
            layers=layers,
            hidden_size=hidden,
            intermediate_size=inner if any(m.part == "mlp" for m in self.modules) else None,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            max_positions=positions or None,
            tied_head=tied,
            activation=activation or "gelu",
            gated=gated,
            residual_dropout=0.0,
            attention_dropout=0.0,
            final_logit_softcapping=fields.number("final_logit_softcapping"),
            logit_scale=None,
            dtype=dtype.removeprefix("torch.") if dtype else None,
            quantized_as=stored_as(self.outer),
            experts=experts,
            modules=tuple(self.modules),
            embeddings=tuple(embeddings),
            head=OutputHead("lm_head", hidden, vocab, bias=False, tied=tied),
            parameters=tuple(self.parameters),
            index_heads=self.size(("index_n_heads",)) or 0,
            is_outline=True,
        )

    def _tied(self) -> bool:
        key = "tie_word_embeddings"
        places = (self.outer, self.file.values, config_class(self.model_type).defaults, self.known.defaults)
        return next((bool(place[key]) for place in places if isinstance(place.get(key), bool)), False)

    def _inner(self, hidden: int) -> int:
        listed = self.fields.values.get("intermediate_size")
        if (
            isinstance(listed, list)
            and listed
            and all(type(each) is int and 0 < each < 1 << 31 for each in listed)
        ):
            return int(max(listed))
        inner = self.size(_INNER) or 4 * hidden
        if self.fields.values.get("block_auto_adjust_ff_dim") is not True:
            return inner
        # LFM2 uses two thirds of the width in the file, rounded up to a multiple.
        inner = int((self.fields.number("block_ffn_dim_multiplier") or 1.0) * (2 * inner // 3))
        multiple = self.size(("block_multiple_of",)) or 256
        return -(-inner // multiple) * multiple

    def _experts(self, hidden: int) -> Experts | None:
        count = self.size(_EXPERTS) or 0
        if count < 2 or self.fields.values.get("is_moe") is False:
            return None
        width = self.size(_EXPERT_INNER) or self._inner(hidden)
        shared = self.size(_SHARED_INNER) or (self.size(_SHARED_COUNT) or 0) * width
        return Experts(count, self.size(_PER_TOKEN) or 1, width, shared or None)

    def _kv_heads(self, heads: int) -> int:
        if self.fields.values.get("multi_query") is True and not self.fields.values.get(
            "new_decoder_architecture"
        ):
            return 1
        return min(self.size(_KV_HEADS) or heads, heads or 1)

    def _kinds(self) -> list[frozenset[str]]:
        """Return the parts of each layer: attention, mixer, mlp, experts.

        In models that list the kinds of their layers, layers with full attention also have the part ``wide``.
        """
        values = self.fields.values
        pattern = self.file.values.get("hybrid_override_pattern")
        if isinstance(pattern, str) and 0 < len(pattern) <= size_bound("layers"):
            return [_ONE_BLOCK.get(letter, _ALL) for letter in pattern]
        listed = next((values[key] for key in _LAYER_KINDS if isinstance(values.get(key), list)), None)
        names = [str(each) for each in listed or ()]
        if names and {"moe", "mlp"} & set(names) and len(names) <= size_bound("layers"):
            return [_ONE_BLOCK.get(name, _ALL) for name in names]
        layers = self.needed(_LAYERS)
        attending = set(self.fields.indices("full_attn_idxs") | self.fields.indices("attn_layer_indices"))
        feed_forward = frozenset(("mlp", "experts"))
        if attending:
            return [feed_forward | {"attention" if i in attending else "mixer"} for i in range(layers)]
        if len(names) == layers:
            mixes = [name not in ("hybrid", "attention") and not _ATTENDS.search(name) for name in names]
            wide = [frozenset(("wide",)) if name == "full_attention" else frozenset() for name in names]
            return [
                feed_forward | more | {"mixer" if mixer else "attention"}
                for mixer, more in zip(mixes, wide, strict=True)
            ]
        interval = self.size(("full_attention_interval", "attn_layer_period"))
        if interval := interval or (4 if self._is_delta_net() else 0):  # the default of Qwen3-Next and 3.5
            offset = self.size(("attn_layer_offset",)) or 0
            offset = offset if "attn_layer_offset" in values else interval - 1
            places = [index % interval == offset for index in range(layers)]
            return [feed_forward | {"attention" if attends else "mixer"} for attends in places]
        if any(key.startswith(("mamba_", "ssm_")) for key in values) or "state_size" in values:
            mixes_too = frozenset(("mixer", "attention")) | feed_forward
            return [mixes_too if self.size(_HEADS) and self.size(_INNER) else frozenset(("mixer",))] * layers
        return [feed_forward | {"attention"}] * layers

    def _is_gated(self, activation: str) -> bool:
        """Return whether the MLP multiplies two projections, judged by its modules or its activation."""
        named = {name.rpartition(".")[2] for name in self.known.modules if "attn" not in name}
        if named & {"up_proj", "down_proj", "gate_up_proj", "fc1", "c_fc", "w1"}:
            return bool(named & {"gate_proj", "gate_up_proj", "w1", "w3"})
        return activation in _GATED if activation else bool(self.size(_INNER))

    def _add_layer(
        self,
        index: int,
        layers: int,
        kinds: frozenset[str],
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        inner: int,
        experts: Experts | None,
        gated: bool,
    ) -> None:
        if "attention" in kinds and heads:
            wide = self.size(("global_head_dim",)) if "wide" in kinds else None
            # The last layers may use the keys and values of earlier ones (Gemma 3n, Gemma 4).
            shares = index >= layers - (self.size(("num_kv_shared_layers",)) or 0)
            self._add_attention(index, hidden, heads, 0 if shares else kv_heads, wide or head_dim)
            if shares and self.fields.values.get("use_double_wide_mlp") is True:
                inner *= 2
        if "mixer" in kinds:
            self._add_mixer(index, hidden)
        if experts is not None and "experts" in kinds and self._is_sparse(index):
            expert = experts.intermediate_size
            wide = (2 if gated else 1) * expert
            self._add_parameter(index, "mlp.gate.weight", "router", (experts.count, hidden))
            self._add_parameter(index, "mlp.experts.gate_up_proj", "expert", (experts.count, wide, hidden))
            self._add_parameter(index, "mlp.experts.down_proj", "expert", (experts.count, hidden, expert))
            if experts.shared_intermediate_size:
                self._add_mlp(
                    index,
                    "mlp.shared_expert",
                    "shared_expert",
                    hidden,
                    experts.shared_intermediate_size,
                    gated,
                )
        elif "mlp" in kinds:
            self._add_mlp(index, "mlp", "mlp", hidden, inner, gated)
        if per_layer := self.size(("hidden_size_per_layer_input",)):
            self._add(index, "per_layer_input_gate", "other", hidden, per_layer)
            self._add(index, "per_layer_projection", "other", per_layer, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self._add_parameter(index, f"{name}.weight", "norm", (hidden,))

    def _is_sparse(self, index: int) -> bool:
        values = self.fields.values
        kinds = values.get("mlp_layer_types")
        if isinstance(kinds, list) and index < len(kinds):
            return str(kinds[index]) != "dense"
        if index in self.fields.indices("mlp_only_layers"):
            return False
        if period := self.size(("expert_layer_period",)):
            return index % period == (self.size(("expert_layer_offset",)) or 0)
        step = self.size(("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")) or 1
        return index >= (self.size(_DENSE_FIRST) or 0) and (index + 1) % step == 0

    def _add_attention(self, index: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        bias = self.fields.values.get("attention_bias") is True
        out = heads * head_dim
        if rank := self.size(("kv_lora_rank",)):
            rope, nope = self.size(("qk_rope_head_dim",)) or 0, self.size(("qk_nope_head_dim",)) or 0
            value = self.size(("v_head_dim",)) or head_dim
            # Null means none here, not the default.
            is_low_rank = self.file.values.get("q_lora_rank", 1) is not None
            if is_low_rank and (query_rank := self.size(("q_lora_rank",))):
                self._add(index, "self_attn.q_a_proj", "attention", hidden, query_rank, bias)
                self._add(index, "self_attn.q_b_proj", "attention", query_rank, out)
            else:
                self._add(index, "self_attn.q_proj", "attention", hidden, out)
            self._add(index, "self_attn.kv_a_proj_with_mqa", "attention", hidden, rank + rope, bias)
            self._add(index, "self_attn.kv_b_proj", "attention", rank, heads * (nope + value))
            self._add(index, "self_attn.o_proj", "attention", heads * value, hidden, bias)
            return
        gate = 2 if self.fields.values.get("attn_output_gate") is True or self._is_delta_net() else 1
        self._add(index, "self_attn.q_proj", "attention", hidden, gate * out, bias)
        for name in ("k_proj", "v_proj"):
            self._add(index, f"self_attn.{name}", "attention", hidden, kv_heads * head_dim, bias)
        self._add(index, "self_attn.o_proj", "attention", out, hidden, bias)

    def _is_delta_net(self) -> bool:
        return bool(self.size(("linear_num_value_heads",)))

    def _add_mixer(self, index: int, hidden: int) -> None:
        if self._is_delta_net():
            keys = (self.size(("linear_num_key_heads",)) or 0) * (self.size(("linear_key_head_dim",)) or 0)
            heads = self.size(("linear_num_value_heads",)) or 0
            values = heads * (self.size(("linear_value_head_dim",)) or 0)
            self._add(index, "linear_attn.in_proj_qkv", "mixer", hidden, 2 * keys + values)
            self._add(index, "linear_attn.in_proj_z", "mixer", hidden, values)
            for name in ("in_proj_b", "in_proj_a"):
                self._add(index, f"linear_attn.{name}", "mixer", hidden, heads)
            self._add(index, "linear_attn.out_proj", "mixer", values, hidden)
            return
        if "conv_L_cache" in self.fields.values:
            self._add(index, "conv.in_proj", "mixer", hidden, 3 * hidden)
            self._add(index, "conv.out_proj", "mixer", hidden, hidden)
            return
        head_count = self.size(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"))
        width = self.size(("mamba_d_ssm",)) or (head_count or 0) * (
            self.size(("mamba_d_head", "mamba_head_dim")) or 0
        )
        width = width or (self.size(("mamba_expand", "expand")) or 2) * hidden
        state = self.size(("mamba_d_state", "ssm_state_size", "state_size")) or 0
        groups = self.size(("mamba_n_groups", "n_groups")) or 1
        self._add(index, "mamba.in_proj", "mixer", hidden, 2 * width + 2 * groups * state + (head_count or 0))
        self._add(index, "mamba.out_proj", "mixer", width, hidden)

    def _add_mlp(self, index: int, name: str, part: Part, hidden: int, inner: int, gated: bool) -> None:
        bias = self.fields.values.get("mlp_bias") is True
        for each in ("gate_proj", "up_proj") if gated else ("up_proj",):
            self._add(index, f"{name}.{each}", part, hidden, inner, bias)
        self._add(index, f"{name}.down_proj", part, inner, hidden, bias)

    def _add_tower(self, hidden: int) -> None:
        """Add the matrices of a vision tower from its own width, depth and MLP."""
        tower = self.outer.get("vision_config")
        if not self.is_nested or not isinstance(tower, dict) or self.loads_text_alone:
            return
        known = config_class(str(tower.get("model_type") or f"{self.model_type}_vision"))
        fields = ConfigFields({**known.defaults, **tower}, "config.json, vision_config")

        def size(*keys: str) -> int:
            return next((v for k in keys if type(v := fields.values.get(k)) is int and 0 < v < 1 << 20), 0)

        width, layers = size("hidden_size", "embed_dim", "width"), size(*_LAYERS, "depth")
        inner = size("intermediate_size") or 4 * width
        for index in range(min(layers, 1000) if width else 0):
            prefix = f"model.vision_tower.layers.{index}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.modules.append(_linear(f"{prefix}.{name}", "vision", index, width, width))
            self.modules.append(_linear(f"{prefix}.fc1", "vision", index, width, inner))
            self.modules.append(_linear(f"{prefix}.fc2", "vision", index, inner, width))
        if width:
            self.modules.append(_linear("model.multi_modal_projector", "vision", None, width, hidden))

    def _add(self, index: int, name: str, part: Part, fan_in: int, fan_out: int, bias: bool = False) -> None:
        if fan_in and fan_out:
            self.modules.append(_linear(f"model.layers.{index}.{name}", part, index, fan_in, fan_out, bias))

    def _add_parameter(self, index: int, name: str, role: Any, shape: tuple[int, ...]) -> None:
        self.parameters.append(Parameter(f"model.layers.{index}.{name}", role, index, shape))


def _linear(
    name: str, part: Part, layer: int | None, fan_in: int, fan_out: int, bias: bool = False
) -> LinearModule:
    return LinearModule(
        name=name,
        kind=name.rpartition(".")[2],
        part=part,
        layer=layer,
        in_features=fan_in,
        out_features=fan_out,
        bias=bias,
        quantizable=True,
    )
