"""Reads the architecture of any config from the model that transformers builds for it without weights.

No family has rules of its own. The kind of a module follows from its place in the tree, its class and its
shape; the libraries tell which weights are tied and which modules bitsandbytes replaces.
:mod:`qlora_tui.catalog.described` runs :func:`describe_all` as a job and stores the results.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_tui.catalog import described
from qlora_tui.catalog.architecture_types import (
    Architecture,
    Embedding,
    Experts,
    LinearModule,
    OutputHead,
    Parameter,
    Part,
    Role,
)
from qlora_tui.catalog.config_fields import check_bounds, stored_as
from qlora_tui.catalog.described import Description
from qlora_tui.data.confined import limit_memory
from qlora_tui.errors import UserError
from qlora_tui.formatting import join_words
from qlora_tui.memory.step import beyond_rules
from qlora_tui.training.class_trial import TOKENS, try_class
from qlora_tui.training.direct_reads import DirectReads, direct_reads
from qlora_tui.training.loss import chunks_obstacle
from qlora_tui.training.model_class import MissingPackageError, build_on_meta, reason_of, unbuildable
from qlora_tui.worker import Failure

_HEADS = ("num_attention_heads", "n_head", "n_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
_RESIDUAL_DROPOUTS = ("resid_pdrop", "residual_dropout", "resid_dropout", "hidden_dropout", "dropout")
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
"""Names of the attention dropout in transformers' configs. If a config lacks the value, the default of its
class applies.
"""


MEMORY_BYTES = 4 << 30
"""Maximum memory for a description, besides the libraries. Real models take some megabytes."""
CPU_S = 20.0
"""Limit of processor time for one description, in seconds. The largest real models take one second."""


_LARGEST_TRIAL = 1 << 28
"""Maximum number of weights of a module that is tested: 1 GiB in float32."""


def describe_all(configs: list[dict[str, Any]]) -> list[Description]:
    """Describe each config, or say why the installed transformers cannot build it."""
    limit_memory(MEMORY_BYTES)
    return [_describe_within_limits(values) for values in configs]


def _describe_within_limits(values: dict[str, Any]) -> Description:
    # At this limit, the kernel ends the process.
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        return Description(architecture=describe(values))
    except UserError as error:
        refusal = error
    except Exception as error:  # a module tree that no rule expects
        refusal = unbuildable(str(values.get("model_type")), reason_of(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    missing = refusal.packages if isinstance(refusal, MissingPackageError) else ()
    return Description(refusal=Failure(**refusal.fields()), missing=missing)


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """Return the exact architecture of a parsed ``config.json``: stored, or else computed in this process.

    Raises UserError if the installed transformers cannot build a language model from it.
    """
    kept = described.stored(values)
    if kept is not None:
        return kept.result()
    # A dtype, the only value of a library's config that is not JSON, is stored in files without its prefix.
    return _describe_json(json.dumps(values, default=lambda dtype: str(dtype).removeprefix("torch.")))


@lru_cache(maxsize=64)
def _describe_json(config: str) -> Architecture:
    return describe(json.loads(config))


def describe(values: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a parsed ``config.json``.

    Raises UserError if the installed transformers cannot build a language model from it.
    """
    check_bounds(values)
    return _Tree(build_on_meta(values)).architecture(values)


class _Tree:
    """The modules of one model on ``meta``, and the kind of each."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        names = {module: name for name, module in self.modules.items()}
        self.head: Any = next(
            (head for part in self.modules.values() if (head := _output_embeddings(part)) is not None), None
        )
        if self.head is None:
            raise unbuildable(model.config.model_type, f"{type(model).__name__} has no output projection")
        self.head_name = names[self.head]
        self.is_composite = self.config is not model.config
        self.decoder = names.get(model.get_decoder(), "")
        self.towers = [
            name
            for name, module in self.modules.items()
            if isinstance(module, PreTrainedModel)
            and type(module.config) not in (type(self.config), type(model.config))
        ]
        self.hidden_size = self._number("hidden_size") or model.get_input_embeddings().weight.shape[1]
        self.layers = self._find_layers()
        candidates = {
            value
            for key, value in vars(self.config).items()
            if "expert" in key and type(value) is int and value > 1
        }
        fused = {
            name: matrices
            for name, module in self.modules.items()
            if self._is_language(name) and (matrices := _matrices(module, candidates))
        }
        lists = {
            len(module) for module in self.modules.values() if isinstance(module, nn.ModuleList)
        } & candidates
        self.expert_counts = {matrices[0].shape[0] for matrices in fused.values()} or lists
        self.experts = frozenset(fused)
        """Modules that hold fused experts."""
        self.kept = [
            *get_keys_to_not_convert(model),
            *(model._keep_in_fp32_modules or ()),
        ]
        """Patterns of the modules that transformers does not quantize."""
        self._block_parts: dict[str, Part] = {}
        self._products: dict[type, bool] = {}

    def architecture(self, values: Mapping[str, Any]) -> Architecture:
        modules, embeddings, parameters = [], [], []
        seen: set[nn.Parameter] = set()
        for name, module in self.modules.items():
            own = [(key, value) for key, value in module.named_parameters(recurse=False) if value not in seen]
            if module is self.head or not own:
                continue
            seen.update(value for _, value in own)
            if isinstance(module, nn.Linear | Conv1D):
                modules.append(self._linear(name, module))
            elif isinstance(module, nn.Embedding) and self._is_language(name):
                embeddings.append(Embedding(name, *map(int, module.weight.shape)))
            else:
                parameters += [
                    Parameter(
                        f"{name}.{key}".lstrip("."),
                        self._role(name, module, value),
                        self._layer(name),
                        tuple(map(int, value.shape)),
                    )
                    for key, value in own
                ]
        return self._assemble(values, modules, embeddings, parameters)

    def _assemble(
        self,
        values: Mapping[str, Any],
        modules: list[LinearModule],
        embeddings: list[Embedding],
        parameters: list[Parameter],
    ) -> Architecture:
        experts = self._experts(modules, parameters)
        dense = [m for m in modules if m.part == "mlp"]
        attention = self._attention()
        heads = self._number(*_HEADS) or 0
        tables = {id(module.weight) for module in self.modules.values() if isinstance(module, nn.Embedding)}
        tied = id(self.head.weight) in tables
        rows, width = map(int, self.head.weight.shape)
        layers = len(self.layers) or self._number("num_hidden_layers") or 0
        if not layers or not rows:
            raise unbuildable(self.model.config.model_type, self._lacks(rows))
        nested = values.get("text_config")
        places = (nested, values) if isinstance(nested, dict) else (values,)
        dtype = next(
            (place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), None
        )
        trial = try_class(self.model, {name: self.modules[name] for name in self.layers})
        recurrent = next((m for m in self.modules.values() if hasattr(m, "ssm_state_size")), None)
        architecture = Architecture(
            model_type=str(values["model_type"]),
            layers=layers,
            hidden_size=int(self.hidden_size),
            intermediate_size=max(
                (m.in_features for m in dense if m.out_features == self.hidden_size), default=None
            ),
            heads=heads,
            kv_heads=_first_int(attention, "num_kv_heads", "kv_heads")
            or heads // (_first_int(attention, "num_key_value_groups") or heads + 1)
            or self._number(*_KV_HEADS)
            or heads,
            head_dim=_first_int(attention, "qk_head_dim", "head_dim", "head_size")
            or self._number("head_dim")
            or (int(self.hidden_size) // heads if heads else 0),
            vocab_size=self._number("vocab_size") or rows,
            max_positions=self._number(*_POSITIONS),
            tied_head=tied,
            activation=str(self._value(_ACTIVATIONS, str) or "silu"),
            gated=self._is_gated(modules, parameters),
            residual_dropout=self._value(_RESIDUAL_DROPOUTS, float) or 0.0,
            attention_dropout=self._value(_ATTENTION_DROPOUTS, float) or 0.0,
            final_logit_softcapping=self._value(("final_logit_softcapping",), float),
            logit_scale=self._logit_scale(),
            dtype=str(dtype).removeprefix("torch.") if dtype else None,
            quantized_as=stored_as(values),
            experts=experts,
            modules=tuple(modules),
            embeddings=tuple(embeddings),
            head=OutputHead(self.head_name, width, rows, getattr(self.head, "bias", None) is not None, tied),
            parameters=tuple(parameters),
            attention_softcap=bool(self._value(("attn_logit_softcapping",), float)),
            own_norms=any(_is_own_layer_norm(module) for module in self.modules.values()),
            own_attention=not trial.attends,
            index_heads=self._value(("index_n_heads",), int) or 0,
            keeps_activations=not self.model.supports_gradient_checkpointing,
            whole_logits=bool(chunks_obstacle(self.model)),
            state_size=_first_int(recurrent, "ssm_state_size") or 0,
            chunk_size=_first_int(recurrent, "chunk_size") or 0,
            layer_runs=trial.layer_runs,
            own_code=trial.own_code,
        )
        return replace(architecture, saves_beyond_rules=beyond_rules(architecture, trial.saved_bytes, TOKENS))

    def _lacks(self, rows: int) -> str:
        """Return what this model lacks for training: tokens, or a decoder with layers."""
        if not rows:
            return f"vocab_size is {self._read('vocab_size')}"
        parts = [name for name in self.model.config.sub_configs if "vision" not in name]
        count = next((f"{key} is {self._read(key)}" for key in _LAYERS if self._read(key) is not None), "")
        where = count or f"its layers are spread over {join_words(parts)}" if parts else count
        return f"{type(self.model).__name__} has no decoder with layers" + (f": {where}" if where else "")

    def _linear(self, name: str, module: Any) -> LinearModule:
        shape = tuple(map(int, module.weight.shape))
        conv1d = isinstance(module, Conv1D)
        fan_in, fan_out = shape if conv1d else shape[::-1]
        replaced = conv1d or type(module) is nn.Linear
        read = name in self._direct_reads.quantized
        called = name not in self._direct_reads.bypassed
        return LinearModule(
            name=name,
            kind=name.rpartition(".")[2],
            part=self._part(name, module),
            layer=self._layer(name),
            in_features=fan_in,
            out_features=fan_out,
            bias=module.bias is not None,
            quantizable=replaced and not read and should_convert_module(name, self.kept),
            read_directly=read,
            conv1d=conv1d,
            adaptable=called
            and (conv1d or self._is_product(module))
            and name.rpartition(".")[2] not in self._refused,
        )

    def _is_product(self, module: nn.Linear) -> bool:
        """Return whether a linear module's class computes exactly the same as ``nn.Linear``."""
        kind = type(module)
        if kind not in self._products:
            self._products[kind] = kind.forward is nn.Linear.forward or _computes_product(module)
        return self._products[kind]

    @cached_property
    def _direct_reads(self) -> DirectReads:
        return direct_reads(self.model, {n: m for n, m in self.modules.items() if m is not self.head})

    @cached_property
    def _refused(self) -> frozenset[str]:
        """Return the kinds of modules that peft does not adapt here, because kernels read their weights."""
        if not any(isinstance(module, nn.Conv1d) for module in self.modules.values()):
            return frozenset()
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        refused = set()
        for kind in {name.rpartition(".")[2] for name in self.modules}:
            try:
                _check_lora_target_modules_mamba(LoraConfig(), self.model, kind)
            except ValueError:
                refused.add(kind)
        return frozenset(refused)

    # Where a module is in the tree.

    def _is_language(self, name: str) -> bool:
        """Return whether a module belongs to the language model rather than to an image or audio encoder."""
        if any(f"{name}.".startswith(f"{tower}.") for tower in self.towers):
            return False
        return not self.is_composite or not self.decoder or f"{name}.".startswith(f"{self.decoder}.")

    def _find_layers(self) -> dict[str, int]:
        """Return the decoder layers by path, with their index."""
        count = self._number(*_LAYERS)
        layers: dict[str, int] = {}
        for name, module in self.modules.items():
            if not isinstance(module, nn.ModuleList) or not self._is_language(name):
                continue
            children = list(module)
            if any(f"{name}.".startswith(f"{layer}.") for layer in layers):
                continue
            if (
                all(isinstance(child, GradientCheckpointingLayer) for child in children)
                or len(children) == count
            ):
                layers |= {f"{name}.{index}": index for index in range(len(children))}
        return layers

    def _layer_path(self, name: str) -> str | None:
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((path for path in paths if path in self.layers), None)

    def _layer(self, name: str) -> int | None:
        if (path := self._layer_path(name)) is not None:
            return self.layers[path]
        if self._is_language(name):
            return None
        return next((int(part) for part in name.split(".") if part.isdigit()), None)

    # The kind of a module.

    def _part(self, name: str, module: Any) -> Part:
        if not self._is_language(name):
            return "vision"
        layer = self._layer_path(name)
        if layer is None:
            return "other"
        block = f"{layer}.{name[len(layer) + 1 :].partition('.')[0]}"
        part = self._block_part(layer, block)
        if part != "mlp":
            return part
        if module.weight.shape[0] in self.expert_counts and self._routes(name):
            return "router"
        if self._holds_experts(block):
            return (
                "expert" if any(part.isdigit() for part in name[len(block) :].split(".")) else "shared_expert"
            )
        return "mlp"

    def _block_part(self, layer: str, block: str) -> Part:
        if block not in self._block_parts:
            self._block_parts[block] = self._part_of_block(layer, block)
        return self._block_parts[block]

    def _part_of_block(self, layer: str, block: str) -> Part:
        module = self.modules[block]
        inner = list(module.modules())
        if any(isinstance(each, nn.Conv1d) for each in inner):
            return "mixer"
        if any(hasattr(each, "is_causal") or "attention" in type(each).__name__.lower() for each in inner):
            return "attention"
        if module is not self.modules[layer] and isinstance(module, nn.Linear | Conv1D):
            siblings = [f"{layer}.{name}" for name, _ in self.modules[layer].named_children()]
            has_mlp = any(
                not isinstance(self.modules[each], nn.Linear | Conv1D)
                and self._part_of_block(layer, each) == "mlp"
                for each in siblings
            )
            return "other" if has_mlp else "mlp"
        wide = (max(each.weight.shape) for each in inner if isinstance(each, nn.Linear | Conv1D))
        is_router = any(
            isinstance(each, nn.Linear) and each.out_features in self.expert_counts for each in inner
        )
        return (
            "mlp"
            if is_router or self._holds_experts(block) or max(wide, default=0) >= self.hidden_size
            else "other"
        )

    def _holds_experts(self, block: str) -> bool:
        return any(f"{name}.".startswith(f"{block}.") for name in self.experts) or any(
            isinstance(module, nn.ModuleList) and len(module) in self.expert_counts
            for module in self.modules[block].modules()
        )

    def _routes(self, name: str) -> bool:
        """Return whether a projection with as many outputs as there are experts routes tokens to them.

        A projection of an MLP with that width has a sibling of the same shape, or is itself one of several
        numbered experts.
        """
        holder, _, own = name.rpartition(".")
        shape = self.modules[name].weight.shape
        alike = [
            child
            for child in self.modules[holder].children()
            if isinstance(child, nn.Linear) and child.weight.shape == shape
        ]
        return len(alike) == 1 and not own.isdigit()

    def _role(self, name: str, module: nn.Module, parameter: nn.Parameter) -> Role:
        if not self._is_language(name):
            return "vision"
        if name in self.experts:
            return "expert"
        if "norm" in type(module).__name__.lower():
            return "norm"
        if isinstance(module, nn.Conv1d):
            return "conv"
        routed = [
            value for value in module.parameters() if value.ndim == 2 and value.shape[0] in self.expert_counts
        ]
        if routed and name not in self.layers and not self._holds_experts(name):
            return "router"
        return "other"

    # Properties of the whole model.

    def _attention(self) -> nn.Module | None:
        """Return the first attention module of the language model."""
        for name, module in self.modules.items():
            if (
                self._layer_path(name) is not None
                and (hasattr(module, "is_causal") or "attention" in type(module).__name__.lower())
                and _first_int(module, "qk_head_dim", "head_dim", "head_size")
            ):
                return module
        return None

    def _experts(self, modules: list[LinearModule], parameters: list[Parameter]) -> Experts | None:
        matrices = [p for p in parameters if p.is_expert_matrices]
        shared = [m for m in modules if m.part == "shared_expert" and m.out_features == self.hidden_size]
        if matrices:
            down = next((p for p in matrices if "down" in p.name), matrices[-1])
            widths = [size for size in down.shape[1:] if size != self.hidden_size]
            count, width = matrices[0].shape[0], widths[0] if widths else int(self.hidden_size)
        else:
            numbered = [m for m in modules if m.part == "expert" and m.out_features == self.hidden_size]
            if not numbered:
                return None
            count, width = (
                len({m.name for m in numbered if m.layer == numbered[0].layer}),
                numbered[0].in_features,
            )
        return Experts(
            count=count,
            per_token=self._number(*_PER_TOKEN) or 1,
            intermediate_size=width,
            shared_intermediate_size=max((m.in_features for m in shared), default=None),
            see_all_tokens=any(
                len(signature(self.modules[name].forward).parameters) == 1 for name in self.experts
            ),
        )

    def _is_gated(self, modules: list[LinearModule], parameters: list[Parameter]) -> bool:
        """Return whether the first MLP, or otherwise the first expert, multiplies two projections."""
        for part in ("mlp", "expert", "shared_expert"):
            first = next((m for m in modules if m.part == part), None)
            if first is None:
                continue
            group = first.name.rpartition(".")[0]
            block = [m for m in modules if m.name.rpartition(".")[0] == group and m.part == part]
            down = sum(m.in_features for m in block if m.out_features == self.hidden_size)
            up = sum(m.out_features for m in block if m.in_features == self.hidden_size)
            return up >= 2 * down
        return any(p.is_expert_matrices and "gate" in p.name for p in parameters)

    def _logit_scale(self) -> float | None:
        scaling = self._value(("logits_scaling",), float)
        scale = self._value(("logit_scale",), float)
        if scaling is None and scale is None:
            return None
        return (scale or 1.0) / (scaling or 1.0)

    def _number(self, *keys: str) -> int | None:
        value = self._value(keys, int)
        return int(value) if value and value > 0 else None

    def _read(self, key: str) -> Any:
        """Return a value of the language model's config; if layers differ, the value for the first layer."""
        try:
            return getattr(self.config, key, None)
        except Exception:
            return getattr(self.config.per_layer_config[0], key, None)

    def _value(self, keys: Iterable[str], kind: type) -> Any:
        """Return the first value of type ``kind`` that the text config has under one of ``keys``, or None."""
        for key in keys:
            value = self._read(key)
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is kind:
                return value
        return None


def _computes_product(module: nn.Linear) -> bool:
    """Test whether a linear module computes the same as an ``nn.Linear`` with its weights."""
    if module.weight.numel() > _LARGEST_TRIAL:
        return False
    values = {name: torch.randn(value.shape) for name, value in module.named_parameters()}
    inputs = torch.randn(2, module.in_features)
    try:
        with torch.device("cpu"), torch.no_grad():
            output = functional_call(module, values, (inputs,))
            product = functional.linear(inputs, values["weight"], values.get("bias"))
        return isinstance(output, Tensor) and torch.allclose(output, product, rtol=1e-3, atol=1e-3)
    except Exception:  # another signature, other parameters, or buffers without values
        return False


def _output_embeddings(module: Any) -> Any:
    """Return the output projection that a module declares if it is a model; None without one."""
    head: Any = None
    if isinstance(module, PreTrainedModel):
        head = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers'
    return head if isinstance(getattr(head, "weight", None), nn.Parameter) else None


def _matrices(module: nn.Module, counts: set[int]) -> list[nn.Parameter]:
    """Return a module's parameters that hold one matrix per expert, for a number of experts in ``counts``."""
    own = () if isinstance(module, nn.Conv1d) else module.parameters(recurse=False)
    return [parameter for parameter in own if parameter.ndim == 3 and parameter.shape[0] in counts]


def _first_int(module: nn.Module | None, *names: str) -> int | None:
    values = [getattr(module, name, None) for name in names]
    return next((value for value in values if type(value) is int), None)


def _is_own_layer_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("LayerNorm") and not isinstance(module, nn.LayerNorm)
