"""From the header of a GGUF file to the ``config.json`` of the model that it describes.

llama.cpp computes a model from metadata, from the presence of tensors, and from what its code does for an
architecture without being told (``ARCHITECTURES``). Each of these becomes a field of the config. A key that
nothing here reads, or whose value transformers' class cannot compute with, refuses the file by name: a scale
or a window that is left out raises no error, only another model, and the check of the first training step
would compare two equally wrong ones. That the tensors are exactly those of transformers' class is checked
when they are converted (:mod:`qlora_tui.training.gguf_weights`).

Names of keys: github.com/ggml-org/ggml, docs/gguf.md. What llama.cpp reads of each architecture, and its
defaults: llama.cpp, src/models and src/llama-model.cpp (``load_hparams``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qlora_tui.catalog.gguf import GgufHeader, gguf_problem
from qlora_tui.catalog.gguf_tokenizers import PRE_TOKENIZERS
from qlora_tui.errors import UserError

Config: TypeAlias = dict[str, Any]

COUNTS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""Keys of every architecture that count something, and the field that each one becomes."""
_MAX_COUNT = 1 << 24
"""Larger than any size of a model, and small enough that no product of two overflows."""
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned")
"""Keys that change nothing that is computed."""
_GATES = {1: "softmax", 2: "sigmoid"}
"""Values of ``expert_gating_func`` (llama.cpp, src/llama-hparams.h)."""
_TOLERANCE = 1e-5
"""Relative difference up to which two numbers are one, of which one went through float32."""


class Metadata:
    """The metadata of one architecture, which remembers what was read.

    Its methods raise UserError for a value of a wrong kind, out of bounds, or not finite.
    """

    def __init__(self, header: GgufHeader, path: Path, architecture: str):
        self.header, self.path, self.architecture = header, path, architecture
        self._unread = {
            key for key in (*header.values, *header.lengths) if key.startswith(f"{architecture}.")
        }

    def value(self, key: str) -> Any:
        """Return the value as it is in the file, or None; ``key`` is without the architecture's prefix."""
        name = f"{self.architecture}.{key}"
        self._unread.discard(name)
        if name in self.header.lengths and name not in self.header.values:
            raise self.problem(f"{name} is a list of {self.header.lengths[name]:,} texts or too many numbers")
        return self.header.values.get(name)

    def count(self, key: str) -> int | None:
        """Return a whole number above zero, or None. One for each layer must be the same everywhere."""
        value = self.value(key)
        if isinstance(value, tuple) and value:
            if len(set(value)) > 1:
                raise self.problem(
                    f"{self.architecture}.{key} differs between layers, which is not supported", lost=True
                )
            value = value[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
            raise self._invalid(key, value, f"a whole number up to {_MAX_COUNT:,}")
        return value or None

    def number(self, key: str) -> float | None:
        """Return a finite number, or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._invalid(key, value, "a finite number")
        return shortest(value) if isinstance(value, float) else float(value)

    def positive(self, key: str) -> float | None:
        """Return a finite number above zero, or None, also for 0, which stands for a missing value."""
        number = self.number(key)
        if number is not None and number < 0:
            raise self._invalid(key, number, "a number above 0")
        return number or None

    def text(self, key: str) -> str | None:
        """Return a text, or None."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self._invalid(key, value, "a text")
        return value

    def expect(self, key: str, *expected: Any) -> None:
        """Read a key that has no field, because only the first of ``expected`` is computed.

        The others mean the same. Raises UserError naming the key for a different value.
        """
        value = self.value(key)
        if value is None or any(_same(value, each) for each in expected):
            return
        raise self.problem(
            f"{self.architecture}.{key} is {_words(value)}, and only {_words(expected[0])} is computed",
            lost=True,
        )

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor."""
        return tensor in self.header.tensors

    def finish(self) -> None:
        """Raise UserError for a key that was not read, unless its value is llama.cpp's default of zero."""
        for name in sorted(self._unread):
            value = self.header.values.get(name)
            if value not in (0, "") or isinstance(value, tuple):
                said = f"{len(value):,} values" if isinstance(value, tuple) else _words(value)
                raise self.problem(f"{name} ({said}) is not understood", lost=True)

    def problem(self, what: str, *, lost: bool = False) -> UserError:
        """Build the error; ``lost`` where the model would be computed differently without the value."""
        why = "Without it, another model would be trained than the file holds." if lost else ""
        return gguf_problem(self.path, what, why=why)

    def _invalid(self, key: str, value: Any, expected: str) -> UserError:
        return self.problem(f"{self.architecture}.{key} is {_words(value)}, not {expected}")


def shortest(value: float) -> float:
    """Return the number with the fewest digits that is the same in float32: 1e-05 for 9.99999974e-06."""
    for digits in range(1, 10):
        rounded = float(f"{value:.{digits}g}")
        if abs(rounded) < 3e38 and struct.pack("<f", rounded) == struct.pack("<f", value):
            return rounded
    return value


def _same(value: Any, expected: Any) -> bool:
    both = (value, expected)
    if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in both):
        return math.isclose(value, expected, rel_tol=_TOLERANCE)
    return bool(value == expected) and type(value) is type(expected)


def _words(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


Reader: TypeAlias = Callable[[Metadata, Config], None]


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp stores and computes one ``general.architecture``, beyond what all have in common."""

    model_type: str
    """transformers' name of it."""
    counts: Mapping[str, str] = field(default_factory=dict)
    """More keys that count something, and their fields."""
    numbers: Mapping[str, str] = field(
        default_factory=lambda: {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
    )
    """Keys of numbers, and their fields."""
    computes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of what is computed without a key, where transformers' class may do otherwise."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Fields that are true if the first layer has a bias of the named part: ``attn_q``."""
    rotates_neighbors: bool = False
    """Whether rotary embedding rotates rows 2i and 2i + 1 of q and k; transformers' class i and i + d/2."""
    norm_offset: float = 0.0
    """What is added to the weight of each norm: Gemma multiplies by 1 + w, and 1 + w is stored."""
    partial_rotation: bool = False
    """Whether transformers' class can rotate a part of a head only."""
    read: tuple[Reader, ...] = ()
    """What reads the rest."""


def _scaled_attention(data: Metadata, config: Config) -> None:
    """Read Gemma's attention scale. The 27B are known by their number of layers (src/models/gemma2.cpp)."""
    layers_27b = {"gemma2": 46, "gemma3": 62}[data.architecture]
    width: int = config["head_dim"]
    if config["num_hidden_layers"] == layers_27b:
        width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width


def _windows(period: int, window: int | None = None) -> Reader:
    """Return a reader of the window and of the layers that have one.

    The last of each ``period`` layers has none, if the file names no pattern. ``window`` is llama.cpp's own.
    """

    def read(data: Metadata, config: Config) -> None:
        layers: int = config["num_hidden_layers"]
        width = data.count("attention.sliding_window") or window
        pattern = data.value("attention.sliding_window_pattern")
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
        if isinstance(pattern, tuple):
            if len(pattern) < layers or any(each not in (0, 1) for each in pattern):
                raise data.problem(
                    f"{data.architecture}.attention.sliding_window_pattern is not a flag a layer"
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


def _rope_by_window(data: Metadata, config: Config) -> None:
    """Give layers with a window a rotary embedding of their own, never scaled, of base 10,000 by default."""
    base = data.positive("rope.freq_base_swa") or _ROPE_BASE
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": base},
    }


def _one_window(data: Metadata, config: Config) -> None:
    """Read the window of all layers, which Phi-3 has."""
    config["sliding_window"] = data.count("attention.sliding_window")


def _softcaps(data: Metadata, config: Config) -> None:
    """Read Gemma 2's caps; llama.cpp's defaults are those of the published models."""
    for key, cap in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        config[key] = data.positive(key) or cap


def _last_softcap(data: Metadata, config: Config) -> None:
    """Read the cap of the logits, which Gemma 3 has none of."""
    config["final_logit_softcapping"] = data.positive("final_logit_softcapping")


def _experts(*, normalized: bool, width: str = "", shared: bool = False) -> Reader:
    """Return a reader of experts whose weights are a softmax over all.

    Those of a token are divided by their sum if ``normalized``. ``width`` is the field of an expert's width,
    if it is not that of a dense layer.
    """

    def read(data: Metadata, config: Config) -> None:
        data.expect("expert_gating_func", 1)
        data.expect("expert_weights_norm", normalized)
        data.expect("expert_weights_scale", 1.0, 0.0)
        data.expect("expert_group_count", 0, 1)
        data.expect("expert_group_used_count", 0, 1)
        own = data.count("expert_feed_forward_length")
        if width:
            config[width] = own or config["intermediate_size"] // max(1, config.get("num_experts_per_tok", 1))
            config["norm_topk_prob"] = normalized
        elif own is not None:
            config["intermediate_size"] = own
        if shared:
            field_name = "shared_expert_intermediate_size"
            config[field_name] = (
                data.count("expert_shared_feed_forward_length") or config["intermediate_size"]
            )

    return read


def _unrotated_layers(data: Metadata, config: Config) -> None:
    """SmolLM3 has no rotary embedding in each fourth layer (src/models/smollm3.cpp)."""
    config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


def _olmo3(data: Metadata, config: Config) -> None:
    """Olmo 3 is an Olmo 2 with windows, and scales the rotary embedding of the other layers only."""
    if not data.header.values.get("olmo2.attention.sliding_window"):
        data.count("attention.sliding_window")
        return
    config["model_type"] = "olmo3"
    _windows(period=4)(data, config)
    base = config["rope_parameters"]["rope_theta"]
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": data.positive("rope.freq_base_swa") or base,
        },
    }


_EXPERT_COUNTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EPSILON = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_GEMMA_ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}
_BIASES = {"attention_bias": "attn_q"}

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", biases=_BIASES | {"mlp_bias": "ffn_up"}, rotates_neighbors=True),
    "smollm3": GgufArchitecture(
        "smollm3", biases=_BIASES | {"mlp_bias": "ffn_up"}, rotates_neighbors=True, read=(_unrotated_layers,)
    ),
    "granite": GgufArchitecture(
        "granite",
        numbers=_EPSILON
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        biases=_BIASES | {"mlp_bias": "ffn_up"},
        rotates_neighbors=True,
    ),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3", biases=_BIASES),
    "qwen2moe": GgufArchitecture(
        "qwen2_moe",
        counts=_EXPERT_COUNTS,
        computes={"decoder_sparse_step": 1, "mlp_only_layers": []},
        read=(_experts(normalized=False, width="moe_intermediate_size", shared=True),),
    ),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe",
        counts=_EXPERT_COUNTS,
        computes={"decoder_sparse_step": 1, "mlp_only_layers": []},
        biases=_BIASES,
        read=(_experts(normalized=True, width="moe_intermediate_size"),),
    ),
    "phi3": GgufArchitecture("phi3", partial_rotation=True, read=(_one_window,)),
    "gemma": GgufArchitecture("gemma", computes=_GEMMA_ACTIVATION, norm_offset=1.0),
    "gemma2": GgufArchitecture(
        "gemma2",
        computes=_GEMMA_ACTIVATION,
        norm_offset=1.0,
        read=(_scaled_attention, _windows(2, 4096), _softcaps),
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        computes=_GEMMA_ACTIVATION,
        norm_offset=1.0,
        read=(_scaled_attention, _windows(6), _rope_by_window, _last_softcap),
    ),
    "olmo2": GgufArchitecture("olmo2", biases=_BIASES, read=(_olmo3,)),
    "glm4": GgufArchitecture("glm4", biases=_BIASES, partial_rotation=True),
    "starcoder2": GgufArchitecture(
        "starcoder2",
        numbers={"attention.layer_norm_epsilon": "norm_epsilon"},
        computes={"hidden_act": "gelu_pytorch_tanh"},
        biases={"use_bias": "attn_q"},
    ),
}
"""By ``general.architecture``, those whose weights become transformers' exactly. Each one is compared with
llama.cpp (tests/export/test_gguf_bases.py)."""
_MIXTRAL = GgufArchitecture(
    "mixtral",
    counts={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    rotates_neighbors=True,
    read=(_experts(normalized=True),),
)


def architecture_of(header: GgufHeader, path: Path) -> GgufArchitecture:
    """Return how the file's architecture is stored. Raises UserError naming one that is unknown."""
    name = header.architecture
    architecture = ARCHITECTURES.get(name or "")
    if architecture is None:
        raise gguf_problem(
            path,
            f"its architecture {_words(name)!r} cannot be trained from GGUF",
            why=f"Those that can: {', '.join(sorted(ARCHITECTURES))}.",
        )
    return _MIXTRAL if name == "llama" and header.values.get("llama.expert_count") else architecture


def to_hf_config(header: GgufHeader, path: Path) -> Config:
    """Convert the header to the form of ``config.json``, for ``parse_architecture`` and for transformers.

    Raises UserError for an architecture that cannot be converted, and for a file with something that the
    converted model would not have.
    """
    architecture = architecture_of(header, path)
    name = header.architecture
    assert name is not None
    data = Metadata(header, path, name)
    _check_file(data)
    config: Config = {"model_type": architecture.model_type, **architecture.computes}
    for key, config_field in (*COUNTS.items(), *architecture.counts.items()):
        if (count := data.count(key)) is not None:
            config[config_field] = count
    for key, config_field in architecture.numbers.items():
        if (number := data.number(key)) is not None:
            config[config_field] = number
    _check_needed(data, config)
    for config_field, part in architecture.biases.items():
        config[config_field] = data.has(f"blk.0.{part}.bias")
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
    """Raise UserError for one of several files, for an unknown tokenizer, and for one without sizes."""
    files = data.header.values.get("split.count")
    if isinstance(files, int) and files > 1:
        raise data.problem(f"the rest of the model is in other files (split.count is {files})")
    kind = data.header.values.get("general.type", "model")
    if kind != "model":
        raise data.problem(f"it holds no model, but general.type {_words(kind)!r}")
    model, pre = (data.header.values.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is None:
        raise data.problem("it has no tokenizer (tokenizer.ggml.model)")
    if model not in ("gpt2", "llama"):
        raise data.problem(f"its tokenizer (tokenizer.ggml.model {_words(model)!r}) is not understood")
    if model == "gpt2" and pre not in PRE_TOKENIZERS:
        raise data.problem(
            f"how it splits text (tokenizer.ggml.pre {_words(pre)!r}) is not understood", lost=True
        )


def _check_needed(data: Metadata, config: Config) -> None:
    for key in ("block_count", "embedding_length", "attention.head_count"):
        if COUNTS[key] not in config:
            raise data.problem(f"{COUNTS[key]} is missing ({data.architecture}.{key})")


def _read_heads(data: Metadata, config: Config, architecture: GgufArchitecture) -> None:
    """Read the width of a head, and refuse another width of values or another scale of attention."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    width = data.count("attention.key_length") or usual
    if data.architecture == "llama" and "llama.attention.key_length" not in data.header.values:
        # Files of 2024 name the width of a head only so (src/llama-model.cpp requires the two to be equal).
        width = data.count("rope.dimension_count") or usual
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = width
    data.expect("attention.value_length", width)
    if "attention.scale" not in architecture.numbers:
        data.expect("attention.scale", width**-0.5, 0.0)


def _no_windows(data: Metadata, config: Config) -> None:
    """Refuse a window shorter than the context where transformers' class or llama.cpp has none."""
    if "sliding_window" in config or "layer_types" in config:
        return
    window = data.count("attention.sliding_window")
    if window and window < config.get("max_position_embeddings", math.inf):
        raise data.problem(f"{data.architecture}.attention.sliding_window is {window:,}", lost=True)


_ROPE_BASE = 10_000.0
"""Base of llama.cpp's rotary embedding, if a file names none."""


def _rope(data: Metadata, config: Config, architecture: GgufArchitecture) -> Config:
    """Return ``rope_parameters``. Raises UserError for an embedding that transformers cannot compute."""
    parameters: Config = {
        "rope_type": "default",
        "rope_theta": data.positive("rope.freq_base") or _ROPE_BASE,
    }
    width: int = config["head_dim"]
    rotated = data.count("rope.dimension_count") or width
    if rotated != width:
        if not architecture.partial_rotation or rotated > width or rotated % 2:
            data.expect("rope.dimension_count", width)
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
    if data.has("rope_freqs.weight"):
        if kind not in (None, "none", "linear") or factor != 1.0 or attention != 1.0:
            raise data.problem(f"it has rope_freqs.weight and rope.scaling.type {_words(kind)!r}", lost=True)
        return parameters | _llama3(data, factors, parameters["rope_theta"], rotated)
    if kind in (None, "none", "linear"):
        data.expect("rope.scaling.attn_factor", 1.0, 0.0)
        if factor == 1.0 or kind == "none":
            return parameters
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return parameters | _yarn(data, factor, original or context, attention)
    raise data.problem(f"its rope.scaling.type {_words(kind)!r} is not understood", lost=True)


def _yarn(data: Metadata, factor: float, original: int, attention: float) -> Config:
    """Return the parameters of YaRN. llama.cpp multiplies its attention factor with the paper's."""
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
    if not _same(attention, usual):
        parameters["attention_factor"] = attention
    return parameters


def _llama3(data: Metadata, factors: Mapping[str, Sequence[float]], base: float, rotated: int) -> Config:
    """Find the parameters of Llama 3.1's scaling that give the file's factors.

    A wavelength below ``original / high`` is divided by 1, one above ``original / low`` by ``factor``, and in
    between the frequency is interpolated: 1 / divisor = (1 - s) / factor + s with
    s = (original / wavelength - low) / (high - low) (transformers, modeling_rope_utils.py). So s is a line
    over 1 / wavelength, whose two coefficients follow from the factors; ``low`` is 1 in all published models.
    """
    values = factors.get("rope_freqs.weight", ())
    wavelengths = [2 * math.pi * base ** (2 * i / rotated) for i in range(rotated // 2)]
    if len(values) != len(wavelengths) or not all(math.isfinite(v) and v >= 1 for v in values):
        raise data.problem("rope_freqs.weight is not a factor of at least 1 for each frequency", lost=True)
    factor = shortest(max(values))
    if factor == 1:
        return {}
    # Points of the line between its two ends.
    points = [
        (1 / wavelength, (1 / value - 1 / factor) / (1 - 1 / factor))
        for wavelength, value in zip(wavelengths, values, strict=True)
        if 1 + _TOLERANCE < value < factor * (1 - _TOLERANCE)
    ]
    candidates = [(1.0, 4.0, 8192)]
    if len(points) > 1:
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
            math.isclose(llama3_factor(wavelength, factor, low, high, original), value, rel_tol=1e-4)
            for wavelength, value in zip(wavelengths, values, strict=True)
        ):
            return parameters
    raise data.problem("rope_freqs.weight does not scale as Llama 3.1 does", lost=True)


def llama3_factor(wavelength: float, factor: float, low: float, high: float, original: int) -> float:
    """Return what Llama 3.1's scaling divides the frequency of a wavelength by."""
    share = (original / wavelength - low) / (high - low)
    share = min(1.0, max(0.0, share))
    return 1 / ((1 - share) / factor + share)
