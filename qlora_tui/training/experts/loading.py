"""Quantizes fused experts while transformers reads a model: one matrix at a time, never a whole parameter.

transformers merges the tensors of a checkpoint, one per expert and projection, into one parameter per
projection before it quantizes (``core_model_loading.py``, ``WeightConverter``). In a layer of Qwen3-30B-A3B,
gate and up take 0.8 GB in 16 bits, and twice as much while they are joined. Here a converter reads each
expert's tensors, quantizes the matrix and drops it. A parameter that is stored fused is read in slices of one
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_tui.training.experts.routing import PROJECTIONS, Experts4bit, replace_experts
from qlora_tui.training.experts.storage import BLOCKS, SCALES, ExpertLayout, dequantize_mxfp4, quantize_into

_QUANTIZER = "bitsandbytes_4bit"


@contextmanager
def experts_in_4_bits() -> Iterator[None]:
    """Quantize experts to 4 bits too when bitsandbytes quantizes a model to 4 bits in this context."""
    original, spawn = auto.AUTO_QUANTIZER_MAPPING[_QUANTIZER], core_model_loading.spawn_materialize
    auto.AUTO_QUANTIZER_MAPPING[_QUANTIZER] = ExpertQuantizer
    core_model_loading.spawn_materialize = _deferred(spawn)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[_QUANTIZER] = original
        core_model_loading.spawn_materialize = spawn


class ExpertQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer for bitsandbytes, extended to fused experts."""

    def _process_model_before_weight_loading(  # type: ignore[override]  # as the class that it extends
        self, model: Any, device_map: Any, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        config = self.quantization_config
        replace_experts(model, config.bnb_4bit_quant_type, nested=bool(config.bnb_4bit_use_double_quant))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # save_pretrained reverses the converters that loaded a parameter; packed parameters are saved as they
        # are.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not isinstance(each, ExpertConverter)]
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is read in 16 bits and stored in 4."""
        if _packed_projection(model, param_name) is not None:
            return not self.pre_quantized
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Return the size of a stored element in bytes: 1 for packed experts."""
        if _packed_projection(model, param_name) is not None:
            return 1
        return float(super().param_element_size(model, param_name, param))

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Wrap expert converters in :class:`ExpertConverter`; add converters of fused and MXFP4 weights."""
        updated: list[Any] = super().update_weight_conversions(  # type: ignore[no-untyped-call]  # its own
            weight_conversions, *args
        )
        if self.pre_quantized:
            return updated
        fused = [
            ExpertConverter([rf"experts\.{name}"], [f"experts.{name}"], [_Whole()]) for name in PROJECTIONS
        ]
        in_mxfp4 = [
            Mxfp4Converter(
                [rf"experts\.{name}{suffix}" for suffix in (BLOCKS, SCALES)], [f"experts.{name}"], [_Whole()]
            )
            for name in PROJECTIONS
        ]
        # transformers uses the first converter that matches a name, and fused patterns also match MXFP4
        # names.
        return [*map(_for_experts, updated), *in_mxfp4, *fused]


class _Whole(ConversionOps):
    """Operation that returns a tensor unchanged, because it is stored as the model holds it."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Whole()


class ExpertConverter(WeightConverter):
    """A family's converter of expert weights, which reads into :class:`Experts4bit` one expert at a time."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        """Return the quantized tensors of a projection by their full names in the model."""
        packed = _packed_projection(model, layer_name)
        if packed is None:
            converted: dict[str, Any] = super().convert(layer_name, model, config, hf_quantizer, loading_info)
            return converted
        experts, name = packed
        layout = experts.layout(name)
        matrices = self._matrices(
            layout, lambda: super(ExpertConverter, self).convert(layer_name, model, config)
        )
        tensors: dict[str, Tensor] = {}
        for expert, matrix in enumerate(matrices):
            if not tensors:
                tensors = layout.empty_tensors(matrix.device)
            quantize_into(tensors, expert, matrix, layout)
        return {layer_name + suffix: tensor for suffix, tensor in tensors.items()}

    def _matrices(
        self, layout: ExpertLayout, convert_whole: Callable[[], dict[str, Any]]
    ) -> Iterator[Tensor]:
        """Yield the matrix of each expert in turn. A matrix is valid until the next one is read."""
        jobs = [
            self.collected_tensors[pattern]
            for pattern in self.source_patterns
            if pattern in self.collected_tensors
        ]
        if all(isinstance(op, _Whole) for op in self.operations) and len(jobs) == len(jobs[0]) == 1:
            self.collected_tensors.clear()
            yield from _stored_slices(jobs[0][0], layout.experts)
        elif self._joins_matrices() and all(len(each) == layout.experts for each in jobs):
            self.collected_tensors.clear()
            yield from _joined(jobs, layout)
        else:  # unknown operations: convert the whole parameter, as transformers would
            (whole,) = convert_whole().values()
            yield from whole[0] if isinstance(whole, list) else whole

    def _joins_matrices(self) -> bool:
        """Return whether the operations only stack the experts and, for two sources, join their rows."""
        operations = [(type(op), op.dim) for op in self.operations if hasattr(op, "dim")]
        expected = [(MergeModulelist, 0), (Concatenate, 1)]
        return len(operations) == len(self.operations) and operations == expected[: len(self.source_patterns)]


class Mxfp4Converter(ExpertConverter):
    """Reads experts that are stored in MXFP4, one at a time."""

    __slots__ = ()

    def _matrices(
        self, layout: ExpertLayout, convert_whole: Callable[[], dict[str, Any]]
    ) -> Iterator[Tensor]:
        jobs = [self.collected_tensors[pattern][0] for pattern in self.source_patterns]
        self.collected_tensors.clear()
        for blocks, scales in zip(*(_stored_slices(job, layout.experts) for job in jobs), strict=True):
            # gpt-oss has its matrices transposed: (inputs, outputs).
            yield dequantize_mxfp4(blocks, scales, torch.bfloat16).T


def _for_experts(converter: Any) -> Any:
    """Return the converter, replaced by an :class:`ExpertConverter` if it fills a projection of experts."""
    if type(converter) is not WeightConverter or not any(
        target.endswith(f"experts.{name}") for target in converter.target_patterns for name in PROJECTIONS
    ):
        return converter
    ours = ExpertConverter(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        converter.operations,
    )
    for scope in ("scope_prefix", "base_model_prefix"):
        if hasattr(converter, scope):
            setattr(ours, scope, getattr(converter, scope))
    return ours


def _packed_projection(model: Any, parameter: str) -> tuple[Experts4bit, str] | None:
    """Return the 4-bit experts and projection that a full parameter name denotes; None for other names."""
    path, _, name = parameter.rpartition(".")
    if name not in PROJECTIONS:
        return None
    module = model.get_submodule(path)
    return (module, name) if isinstance(module, Experts4bit) else None


def _joined(jobs: list[list[Any]], layout: ExpertLayout) -> Iterator[Tensor]:
    """For each expert, concatenate the rows from all sources into one matrix (rows, columns), and yield it.

    The buffer is reused: the next matrix overwrites the previous one.
    """
    matrix: Tensor | None = None
    for expert in range(layout.experts):
        row = 0
        for of_source in jobs:
            part = _read(of_source[expert])
            of_source[expert] = None
            if matrix is None:
                matrix = part.new_empty(layout.rows, layout.columns)
            matrix[row : row + len(part)] = part
            row += len(part)
            del part
        if matrix is None or row != layout.rows:
            raise ValueError(f"an expert with {row} rows instead of {layout.rows}")
        yield matrix


def _stored_slices(job: Any, experts: int) -> Iterator[Tensor]:
    """Yield each expert's part of a stored tensor whose first dimension is the expert."""
    if isinstance(job, _DeferredRead) and hasattr(job.stored, "get_shape"):
        yield from map(job.expert, range(experts))
    else:
        whole = _read(job)
        yield from (whole[expert] for expert in range(experts))


@dataclass(frozen=True)
class _DeferredRead:
    """A read that transformers defers, and that can also read a single expert of its tensor."""

    read_whole: Callable[[], Tensor]
    stored: Any
    """A slice of a safetensors file, or a tensor."""
    device: Any
    dtype: torch.dtype | None

    def __call__(self) -> Tensor:
        return self.read_whole()

    def expert(self, number: int) -> Tensor:
        """Return the matrix of one expert, identical to the corresponding slice of the whole tensor."""
        matrix: Tensor = self.stored[number : number + 1][0]
        return matrix.to(device=self.device, dtype=self.dtype if matrix.is_floating_point() else None)


def _deferred(spawn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' ``spawn_materialize`` to return a :class:`_DeferredRead`."""

    def spawn_materialize(
        pool: Any, tensor: Any, device: Any = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Any:
        job = spawn(pool, tensor, device, dtype, **options)
        return job if hasattr(job, "result") else _DeferredRead(job, tensor, device, dtype)

    return spawn_materialize


def _read(job: Any) -> Tensor:
    """Return the tensor of a deferred read, which is a function or, in a thread, a future."""
    tensor: Tensor = job.result() if hasattr(job, "result") else job()
    return tensor
