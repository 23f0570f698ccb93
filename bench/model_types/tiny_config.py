"""Tiny configs of every model type: the defaults of transformers' own classes, shrunk by rules.

Sizes shrink by three factors, so that their products and ratios stay valid: numbers of heads by one, widths
of heads by another, and all multiples of the hidden size by the product of both. One layer of each kind is
kept, where the config's lists of layer properties determine the kind. Values that no rule derives are in
:data:`SETTINGS`, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

VOCABULARY = 384
"""Vocabulary size of every model, larger than the test tokenizer's: images have tokens of their own."""
_LAYERS, _SAME_LAYERS = 4, 2
"""Number of layers of a model whose layers differ, and of a model with equal layers."""
_HEADS, _HEAD_WIDTH = 4, 16
_INDEX_HEADS = 32
"""Number of heads that select keys. A key's score is a sum over these heads in which half of the terms are
zero. With few heads, several keys score zero, and which of them is selected depends on their number."""
_WINDOW, _CHUNK = 8, 16
"""Tokens that a window reaches back, and tokens of a chunk of linear attention. A sample has more of both."""
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "dim_model")
_HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads",
    "encoder_attention_heads",
)  # fmt: skip
_HEAD_WIDTHS = ("head_dim", "attention_head_dim", "kv_channels", "dim_head", "d_kv", "qk_nope_head_dim")
_TEXT = ("text_config", "llm_config", "language_config")
_TEXT_WIDTHS = ("out_hidden_size", "text_hidden_size", "output_dim", "adapter_out_dim")
"""Names of the text model's hidden size in the configs of other parts."""
_NOT_SETTINGS = ("model_type", "transformers_version", "architectures", "dtype", "_name_or_path")

_MROPE = [2, 3, 3]
"""Rotary frequencies of time, height and width, for heads of width 16."""
_MROPE_UNSET = {"text_config.rope_parameters.mrope_section": _MROPE}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LOOP = {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
_SPARSE = ["full_attention", "minimax_m3_sparse"]
SETTINGS: dict[str, dict[str, Any]] = {
    # The class has another default for the sections than its config, which has none.
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_vl"), _MROPE_UNSET),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_omni_thinker"), _MROPE_UNSET),
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {**_ROPE, "mrope_section": _MROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": _MROPE}}},
    # The defaults of these classes lack settings that their models need.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "chameleon": {"vocabulary_map": {"<image>": 380}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32,
    },
    "emu3": {"vocabulary_map": {"<image>": 380}},
    "ernie4_5_vl_moe": {
        "vision_config.rope_parameters": _ROPE, "text_config.rope_parameters.mrope_section": [3, 3, 2],
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "reformer": {"is_decoder": True},
    "step3p7": {"text_config.sliding_window": _WINDOW},
    "xmod": {"default_language": "en_XX"},
    # By default, these have no layers that select blocks of keys.
    "minimax_m3_vl_text": {"layer_types": _SPARSE},
    "minimax_m3_vl": {"text_config.layer_types": _SPARSE},
    # Numbers that belong together but shrink differently.
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 4},
    "apertus1p5": {
        "image_token_offset": 100, "audio_token_offset": 200,
        "vision_config.codebook_size": 100, "audio_config.codebook_size": 100,
    },
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 4},
    "inkling2_loop_text": _LOOP,
    "inkling2_loop": {f"text_config.{name}": value for name, value in _LOOP.items()},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
}  # fmt: skip
"""Settings that no rule derives, by model type and path in the config."""


_NO_DEFAULT = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    }
}
"""Arguments without which a class rejects its own defaults."""


def settings_of(model_type: str, head_width: int = _HEAD_WIDTH) -> dict[str, Any]:
    """Return the arguments of ``AutoConfig.for_model`` for a tiny model of a type.

    Args:
        model_type: The model type.
        head_width: Maximum width of an attention head.
    """
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type, **_NO_DEFAULT.get(model_type, {})).to_dict()
    settings = shrink(defaults, head_width=head_width)
    for path, value in SETTINGS.get(model_type, {}).items():
        *holders, name = path.split(".")
        holder = settings
        for each in holders:
            holder = holder[each]
        holder[name] = _widened(value, head_width) if "rope" in path else value
    return {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}


def _widened(rope: Any, head_width: int) -> Any:
    """Return settings of rotary positions with sections for heads of this width."""
    if isinstance(rope, dict):
        return {name: _widened(value, head_width) for name, value in rope.items()}
    return [size * head_width // _HEAD_WIDTH for size in rope] if isinstance(rope, list) else rope


def shrink(
    values: dict[str, Any], text: tuple[int, int] | None = None, head_width: int = _HEAD_WIDTH
) -> dict[str, Any]:
    """Return a config with small sizes.

    Args:
        values: A config, or one nested in it.
        text: Hidden size of the model's text part, before and after; None if the text part is within
            ``values``.
        head_width: Maximum width of a head.
    """
    return _Shrinking(values, text, head_width).settings()


class _Shrinking:
    """The factors by which the sizes of one config shrink."""

    def __init__(self, values: dict[str, Any], text: tuple[int, int] | None, head_width: int) -> None:
        self._values = values
        self._most = head_width
        self._hidden = _first(values, _HIDDEN) or _HEADS * _HEAD_WIDTH
        self._heads = _first(values, _HEAD_COUNTS) or 1
        self._width = _first(values, _HEAD_WIDTHS) or max(1, self._hidden // self._heads)
        self._heads_to = min(self._heads, _HEADS)
        self._width_to = min(self._width, head_width)
        self._hidden_to = min(self._hidden, _HEADS * head_width)
        share, rest = divmod(self._heads * self._width, self._hidden)
        if share > 1 and not rest and self._heads > 1:
            self._hidden_to = max(16, self._heads_to * self._width_to // share)
        part = next((values[name] for name in _TEXT if isinstance(values.get(name), dict)), None)
        within = None if part is None else _Shrinking(part, None, head_width)
        self._text = text or (within._hidden, within._hidden_to) if within else text
        self._count = next((v for k, v in values.items() if _LAYER_COUNT.fullmatch(k) and _is_size(v)), 0)
        self._kept = self._kept_layers()

    def settings(self) -> dict[str, Any]:
        """The config with every value shrunk by the first rule that matches its name."""
        return {name: self._value(name, value) for name, value in self._values.items()}

    def _kept_layers(self) -> list[int]:
        """The layers to keep: the first of each kind, then the second of each, rarest kinds first."""
        lists = [v for v in self._values.values() if self._is_of_layers(v)]
        kinds: dict[tuple[str, ...], list[int]] = {}
        for layer in range(self._count):
            kinds.setdefault(tuple(str(values[layer]) for values in lists), []).append(layer)
        differ = len(kinds) > 1 or any(_PERIOD.search(name) for name in self._values)
        rarest = sorted(kinds.values(), key=len)
        order = [layer for turn in zip_longest(*rarest) for layer in turn if layer is not None]
        return sorted(order[: max(len(kinds), _LAYERS) if differ else _SAME_LAYERS])

    def _is_of_layers(self, value: Any) -> bool:
        """Return whether a value describes each layer, other than by the layer's number."""
        is_list = isinstance(value, list | tuple) and len(value) == self._count
        return is_list and list(value) != list(range(self._count))

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self._mapping(name, value)
        if isinstance(value, list | tuple):
            return self._list(name, list(value))
        if value is None:
            return self._filled(name)
        if isinstance(value, float):
            if _SPREAD.search(name):
                return min(0.1, 5 * value) if value < 1 else value
            return 0.0 if "drop" in name or "jitter" in name else value  # settings of random behavior
        if not _is_size(value) or value <= 0:
            return value
        if name.endswith(("token_id", "token_index")):
            return _token(name)
        if name in _TEXT_WIDTHS and self._text:
            return self._text[1]
        for pattern, rule in _RULES:
            if pattern.search(name):
                return rule(self, value)
        return value

    def _filled(self, name: str) -> Any:
        """Return a value for a setting that a class omits although its model needs it."""
        if name == "head_dim" and _first(self._values, _HEAD_COUNTS):
            return self._width_to
        return {
            "num_key_value_heads": self._heads_to, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "indexer_n_heads": _INDEX_HEADS, "indexer_kv_heads": 1,
            "indexer_budget": 16, "indexer_head_dim": self._most, "indexer_compress_ratio": 4,
        }.get(name)  # fmt: skip

    def _mapping(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        if value and all(str(key).isdigit() for key in value):
            layers = {int(key): each for key, each in value.items()}
            kept = {place: layers[i] for place, i in enumerate(self._kept) if i in layers}
            return {str(i): self._nested(e) for i, e in kept.items()} if name == "per_layer_config" else value
        if name.startswith("rope"):
            return self._rope(value)
        if name in ("id2label", "label2id"):
            return value
        return shrink(value, self._text, self._most)

    def _nested(self, value: Any) -> Any:
        """Return a nested config, shrunk with the factors of the whole."""
        return {k: self._value(k, v) for k, v in value.items()} if isinstance(value, dict) else value

    def _rope(self, value: dict[str, Any]) -> dict[str, Any]:
        rope: dict[str, Any] = {}
        for name, each in value.items():
            if isinstance(each, dict):
                each = self._rope(each)
            elif isinstance(each, list | tuple):
                each = self._sections(each) if "section" in name else list(each)[: self._width_to // 2]
            rope[name] = each
        return rope

    def _sections(self, sizes: Iterable[int]) -> list[int]:
        sizes = list(sizes)
        total = self.head_width(2 * sum(sizes)) // 2
        small = [max(1, size * total // sum(sizes)) for size in sizes]
        small[0] += total - sum(small)
        return small

    def _list(self, name: str, value: list[Any]) -> list[Any] | int:
        if value == [] or not self._count:
            return value
        is_of_layers = self._is_of_layers(value)
        if _LAYER_NUMBERS.search(name) and all(map(_is_size, value)) and not is_of_layers:
            numbers = {each % self._count for each in value}
            return [place for place, layer in enumerate(self._kept) if layer in numbers] or [0]
        if is_of_layers:
            return [value[layer] for layer in self._kept]
        if name.endswith("token_id"):
            return _token(name)
        if "section" in name and all(_is_size(each) for each in value):
            return self._sections(value)
        if _SIZE.search(name) and all(_is_size(each) for each in value):
            return [self.size(each) for each in value]
        return value

    def layers(self, value: int) -> int:
        """Shrink the number of layers of the model or of a part of it."""
        return len(self._kept) if value == self._count else min(value, _SAME_LAYERS)

    def last_layer(self, value: int) -> int:
        """Shrink the number of a layer near the end."""
        return min(value, len(self._kept) - 1)

    def heads(self, value: int) -> int:
        """Shrink a number of heads so that it still divides the number of attention heads."""
        small = max(1, value * self._heads_to // self._heads)
        while self._heads % value == 0 and self._heads_to % small:
            small -= 1
        return small

    def head_width(self, value: int) -> int:
        """Shrink the width of a head, or a part of it."""
        return min(value, max(4, round(value * self._width_to / self._width / 4) * 4))

    def size(self, value: int) -> int:
        """Shrink a width that is a multiple of the hidden size, or close to one."""
        return min(value, max(8, round(value * self._hidden_to / self._hidden / 8) * 8))


def _first(values: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((values[name] for name in names if _is_size(values.get(name)) and values[name] > 0), None)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(name: str) -> int:
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return known.get(name, VOCABULARY - 1 - sum(map(ord, name)) % 50)


def _at_most(limit: int) -> Callable[[_Shrinking, int], int]:
    return lambda shrinking, value: min(value, limit)


_LAYER_COUNT = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|layers|depth|(num_)?(de|en)coder_(num_)?layers|num_blocks"
    r"|num_hidden_blocks|n_\w+_layers|\w+_depth|num_lstm_layers|num_residual_layers"
)
_LAYER_NUMBERS = re.compile(r"layers|idxs|indexes|indices|layer_ids|_layer$|layer_index")
_PERIOD = re.compile(
    r"(_pattern|_interval|_period|_frequency|every_n_layers|_sparse_step|_layer_step|layer_group_size)$"
)
_SPREAD = re.compile(r"initializer_range|init_std")
_SIZE = re.compile(
    r"hidden_size|intermediate|_dim$|^dim$|d_model|n_embd|ffn|d_ff$|^dff$|dim_ff|d_ssm|n_inner|_rank$|ff_dim"
    r"|embedding_size|size_per_layer|width$|dim_model|lowrank"
    r"|_hidden$|embed_proj|_dims?_|adapter_input"
)
_RULES: list[tuple[re.Pattern[str], Callable[[_Shrinking, int], int]]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"^ngram_vocab_size_base$|num_embeddings", _at_most(VOCABULARY)),
        (r"vocab(?!_offset)", _at_most(VOCABULARY)),
        (r"nextn|mtp", _at_most(1)),
        (r"first_k_dense|num_dense_layers|layer_start|kv_shared_layers", _at_most(1)),
        (r"max_window_layers|_layer_end|insert_layer_id|_index_start$", _Shrinking.last_layer),
        (_PERIOD.pattern, _at_most(2)),
        (r"_layer_offset$", _at_most(1)),
        (rf"^({_LAYER_COUNT.pattern})$", _Shrinking.layers),
        (r"shared_experts?$", _at_most(1)),
        (r"index_topk$|indexer_budget", _at_most(_CHUNK)),
        (r"index_topk_blocks", _at_most(2)),
        (r"per_tok|top_?k(_experts)?$|moe_k$", _at_most(2)),
        (r"topk_group|expert_group$|n_group$", _at_most(1)),
        (r"experts$", _at_most(4)),
        (r"chunk_size|block_size|kpool|heavily_compressed", _at_most(_CHUNK)),
        (r"window", _at_most(_WINDOW)),
        (r"base_channels$", _at_most(32)),
        (r"image_size|^resolution$", _at_most(64)),
        (
            r"head_?dim|d_head|dim_head|d_kv|kv_channels|rotary_dim|head_size|query_pre_attn",
            _Shrinking.head_width,
        ),
        (r"^index(er)?_n_heads$", _at_most(_INDEX_HEADS)),
        (r"heads(_|$)|n_head$|query_groups$", _Shrinking.heads),
        (r"d_state|state_size", _at_most(16)),
        (r"n_?groups$", _at_most(2)),
        (_SIZE.pattern, _Shrinking.size),
    )
]
