"""Measures what quantizing a base changes in its predictions, with one decoder layer at a time in memory.

The 16-bit weights stay mapped from their files. A layer's weights are copied to the device when the layer
runs, and quantized there: rounded to 4 bits and back, or used in products that round like bitsandbytes' int8
products. So a model that does not fit
in 16 bits can be measured: memory holds embeddings, head and norms, and at most two copies of the largest
layer.

The hidden states of some rows of the recipe's data go through all layers three times: through the 16-bit
model, in which each layer also runs quantized on the same inputs to measure its own error; through the
quantized model; and through the quantized model with the worst layers in 16 bits. This is the job of
``memory.quality``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.catalog.architecture_types import Architecture, inner_name
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.data.dataset import prepare_dataset
from qlora_tui.data.step_plan import TokenizedDataset
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.errors import UserError
from qlora_tui.memory.quality import Difference, LayerError, Quality
from qlora_tui.memory.weights import quantized_experts, quantizes
from qlora_tui.recipe.schema import Quantization, Recipe
from qlora_tui.training.compute_device import ComputeDevice, find_device
from qlora_tui.training.experts.storage import round_to_4_bits
from qlora_tui.training.gguf_conversion import model_folder
from qlora_tui.training.model import freeze, load_mapped
from qlora_tui.training.model_class import decoder_layers
from qlora_tui.worker import Report

_ROWS, _ROW_TOKENS = 16, 512
"""``_ROWS``: maximum number of rows to compare, spread over the data. ``_ROW_TOKENS``: maximum number of
tokens of a row.
"""
_KEPT_SHARE = 16
"""One of this many layers is tried in 16 bits."""
_HEAD_ROWS = 64
"""Number of tokens whose logits are in memory at a time."""
_OUTLIER = 6.0
"""Activation at which bitsandbytes starts to multiply a column in 16 bits (``llm_int8_threshold``)."""


def measure_quality(recipe: Recipe, report: Report) -> Quality:
    """Measure the recipe's quantization on rows of its data.

    Raises UserError if the recipe has no data or no quantization, or the model cannot be measured.
    """
    from qlora_tui.gpu.torch_env import allocator_variables, configure_torch_env

    configure_torch_env({**allocator_variables(os.environ), "HF_HUB_OFFLINE": "1"})
    if recipe.quantization.method == "none":
        raise UserError(
            "Nothing is quantized",
            what='quantization.method is "none": the base is trained as it is stored.',
            fix='Set quantization.method to "nf4" or "int8" to measure what quantization changes.',
        )
    files = resolve_model(recipe.model.id)
    if files.architecture.quantized_as:
        raise UserError(
            "This model is stored quantized",
            what=f"The model's files hold weights in {files.architecture.quantized_as}.",
            why="There are no 16-bit weights to compare with.",
            fix="Choose the repository with 16-bit weights, if there is one.",
        )
    folder = model_folder(files, lambda done, total: report(done, total, "converting"))
    report(0, 0, "tokenizing")
    data = prepare_dataset(recipe, ChatTokenizer.from_folder(folder, recipe.model.chat_template))
    report(0, 0, "loading the model")
    device = find_device(recipe)
    model = load_mapped(folder, device)
    return compare_layers(model, files.architecture, recipe.quantization, data.train, device, report)


def compare_layers(
    model: Any,
    architecture: Architecture,
    settings: Quantization,
    samples: TokenizedDataset,
    device: ComputeDevice,
    report: Report,
) -> Quality:
    """Measure a model whose weights are mapped from its files.

    Raises UserError if its layers cannot be run one by one.
    """
    streamed = StreamedModel(model, architecture, settings, device)
    rows = _rows(samples)
    passes = 3 * len(streamed.layers)
    done = 0

    def on_layer() -> None:
        nonlocal done
        done += 1
        report(done, passes, "comparing layer by layer")

    streamed.on_layer = on_layer
    with torch.inference_mode():
        reference = streamed.hidden_states(rows, measures_layers=True)
        quantized = streamed.hidden_states(rows)
        kept = streamed.worst_layers(max(1, len(streamed.layers) // _KEPT_SHARE))
        with_kept = streamed.hidden_states(rows, kept=kept)
        return Quality(
            method=settings.method,
            rows=len(rows),
            tokens=len(reference),
            all_layers=streamed.difference(reference, quantized),
            layers=streamed.layer_errors(),
            kept_layers=kept,
            with_kept=streamed.difference(reference, with_kept),
        )


class Row:
    """The tokens of a row, and the positions whose next token is in the loss."""

    def __init__(self, token_ids: list[int], places: list[int]) -> None:
        self.token_ids = token_ids
        self.places = places


def _rows(samples: TokenizedDataset) -> list[Row]:
    """Return rows spread over the data, truncated, without those that have no tokens in the loss."""
    step = max(1, len(samples) // _ROWS)
    rows = []
    for i in range(0, len(samples), step):
        ids, mask = list(samples.token_ids(i)), list(samples.loss_mask(i))
        first = next((place for place, wanted in enumerate(mask) if wanted and place), len(ids))
        # If the text before the answer is longer than a row, keep only its last part.
        begin = max(0, first - _ROW_TOKENS // 2)
        ids, mask = ids[begin : begin + _ROW_TOKENS], mask[begin : begin + _ROW_TOKENS]
        places = [place - 1 for place in range(1, len(ids)) if mask[place]]
        if places:
            rows.append(Row(ids, places))
    return rows[:_ROWS]


class StreamedModel:
    """A model with mapped weights whose decoder layers run one at a time, in 16 bits or quantized."""

    def __init__(
        self, model: Any, architecture: Architecture, settings: Quantization, device: ComputeDevice
    ) -> None:
        self._model, self._device, self._settings = freeze(model.eval()), device, settings
        self._decoder = model.get_decoder()
        self.layers: list[nn.Module] = decoder_layers(model)
        if not self.layers:
            raise UserError(
                "This model cannot be measured",
                what=f"The decoder layers of {type(model).__name__} cannot be run one by one.",
                fix="Train a few steps with each quantization, and compare the losses on the Runs screen.",
            )
        self.peak_layer_bytes = 0
        """Largest number of bytes of layer weights that were on the device at once."""
        self.on_layer: Callable[[], None] = lambda: None
        self._errors: dict[int, float] = {}
        self._kept: Collection[int] = ()
        self._measures = False
        self._mask: Tensor | None = None
        self._output: Any = None
        """The last output of the decoder, with all fields that the model needs from it to compute logits."""
        names = {
            inner_name(f"{module.name}.weight")
            for module in architecture.modules
            if quantizes(settings, module)
        }
        experts = {inner_name(each.name) for each in architecture.parameters if each.is_expert_matrices}
        if quantized_experts(settings, architecture) == "none":
            experts = set()
        named = {inner_name(name): p for name, p in model.named_parameters()}
        wanted = {id(named[name]) for name in names | experts if name in named}
        self._experts = {id(named[name]) for name in experts if name in named}
        """Ids of the parameters of quantized experts. ``quantization.skip`` has no effect on experts."""
        self._names = [
            frozenset(name for name, p in layer.named_parameters() if id(p) in wanted)
            for layer in self.layers
        ]
        """Names of the quantized weights in each layer."""
        for number, layer in enumerate(self.layers):
            vars(layer)["forward"] = self._streamed(number, layer)
        self._place_the_rest()

    def _place_the_rest(self) -> None:
        """Copy to the device all parameters outside the layers (embeddings, head, norms), and all buffers."""
        in_layers = {id(p) for layer in self.layers for p in layer.parameters()}
        for parameter in self._model.parameters():
            if id(parameter) not in in_layers:
                parameter.data = parameter.data.to(self._device.torch_device, self._device.dtype)
        for buffer in self._model.buffers():
            buffer.data = buffer.data.to(self._device.torch_device)

    def _streamed(self, number: int, layer: nn.Module) -> Callable[..., Any]:
        library_forward = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._on_device(layer):
                if self._measures:
                    # The quantized run comes first, so that states shared between layers (keys and values)
                    # end as the reference's.
                    with self._as_quantized(number, layer):
                        changed = _hidden(library_forward(*args, **kwargs))
                    output = library_forward(*args, **kwargs)
                    self._errors[number] = self._error(_hidden(output), changed)
                else:
                    with self._as_quantized(number, layer, only_experts=number in self._kept):
                        output = library_forward(*args, **kwargs)
            self.on_layer()
            return output

        return forward

    @contextmanager
    def _on_device(self, layer: nn.Module) -> Iterator[None]:
        """Hold the layer's weights on the device, in the compute dtype."""
        mapped = {parameter: parameter.data for parameter in layer.parameters()}
        try:
            for parameter, data in mapped.items():
                parameter.data = data.to(self._device.torch_device, self._device.dtype, copy=True)
            self._count(sum(parameter.nbytes for parameter in mapped))
            yield
        finally:
            for parameter, data in mapped.items():
                parameter.data = data

    @contextmanager
    def _as_quantized(self, number: int, layer: nn.Module, *, only_experts: bool = False) -> Iterator[None]:
        """Make the layer, whose weights are on the device, compute with quantized weights."""
        weights = {
            name: p
            for name, p in layer.named_parameters()
            if name in self._names[number] and (not only_experts or id(p) in self._experts)
        }
        whole = {name: parameter.data for name, parameter in weights.items()}
        modules = [layer.get_submodule(name.rpartition(".")[0]) for name in weights]
        try:
            for (name, parameter), module in zip(weights.items(), modules, strict=True):
                if self._settings.method == "int8":
                    vars(module)["forward"] = _int8_forward(module)
                else:
                    matrix = round_to_4_bits(_matrix(module, whole[name]), self._settings)
                    parameter.data = _matrix(module, matrix)
            self._count(
                sum(p.nbytes for p in layer.parameters())
                + sum(data.nbytes for name, data in whole.items() if weights[name].data is not data)
            )
            yield
        finally:
            for (name, parameter), module in zip(weights.items(), modules, strict=True):
                parameter.data = whole[name]
                vars(module).pop("forward", None)

    def _count(self, layer_bytes: int) -> None:
        self.peak_layer_bytes = max(self.peak_layer_bytes, layer_bytes)

    def _error(self, reference: Tensor, changed: Tensor) -> float:
        """Return the mean relative error of the hidden states over all tokens that are not padding.

        A token's error is the norm of the difference, divided by the norm of the reference.
        """
        lengths = reference.float().norm(dim=-1).clamp_min(1e-12)
        shares = (changed.float() - reference.float()).norm(dim=-1) / lengths
        return float(shares.flatten()[self._mask].mean()) if self._mask is not None else float(shares.mean())

    def hidden_states(
        self, rows: list[Row], *, kept: Collection[int] = (), measures_layers: bool = False
    ) -> Tensor:
        """Return the last hidden states at the recorded positions of all rows, (positions, hidden size).

        Args:
            rows: padded to the longest of them.
            kept: layers whose linear modules stay in 16 bits.
            measures_layers: run the 16-bit model, and compute the error of each layer on its inputs.
        """
        self._kept, self._measures = kept, measures_layers
        device, longest = self._device.torch_device, max(len(row.token_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row.token_ids)] = torch.tensor(row.token_ids)
            mask[number, : len(row.token_ids)] = 1
        self._mask = mask.flatten().bool().to(device)
        self._output = self._decoder(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        )
        hidden = self._output.last_hidden_state
        return torch.cat([hidden[number, row.places] for number, row in enumerate(rows)])

    def layer_errors(self) -> tuple[LayerError, ...]:
        """Return the error of each layer, and the memory that keeping the layer in 16 bits takes."""
        return tuple(
            LayerError(number, self._errors[number], self._kept_bytes(number))
            for number in range(len(self.layers))
        )

    def worst_layers(self, count: int) -> tuple[int, ...]:
        """Return the layers with the largest errors, in the order of the model."""
        return tuple(sorted(sorted(self._errors, key=lambda number: -self._errors[number])[:count]))

    def _kept_bytes(self, number: int) -> int:
        parameters = dict(self.layers[number].named_parameters())
        weights = sum(
            parameters[name].numel()
            for name in self._names[number]
            if id(parameters[name]) not in self._experts
        )
        bits = 8 if self._settings.method == "int8" else 4.127 if self._settings.double_quantization else 4.5
        return round(weights * (16 - bits) / 8)

    def difference(self, reference: Tensor, other: Tensor) -> Difference:
        """Compare the next-token distributions of two sets of hidden states."""
        divergence, changed = 0.0, 0
        for begin in range(0, len(reference), _HEAD_ROWS):
            logs = self._log_probabilities(reference[begin : begin + _HEAD_ROWS])
            others = self._log_probabilities(other[begin : begin + _HEAD_ROWS])
            divergence += float((logs.exp() * (logs - others)).sum(dtype=torch.float64))
            changed += int((logs.argmax(-1) != others.argmax(-1)).sum())
        return Difference(max(0.0, divergence / len(reference)), changed / len(reference))

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return log probabilities (tokens, vocabulary) as the model computes them after its decoder."""
        output = replace(self._output, last_hidden_state=hidden[None])
        vars(self._decoder)["forward"] = lambda *args, **kwargs: output
        try:
            places = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits = self._model(input_ids=places, use_cache=False).logits[0]
        finally:
            del vars(self._decoder)["forward"]
        if not math.isfinite(float(logits.sum())):
            raise UserError(
                "The model's predictions are NaN or infinite",
                what="Infinite or undefined logits were computed.",
                fix='Set quantization.compute_dtype to "float32", and measure again.',
            )
        logs: Tensor = logits.float().log_softmax(-1)
        return logs


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as rows of output features; for GPT-2's ``Conv1D`` a transposed view."""
    return weight.T if hasattr(module, "nf") else weight


def _int8_forward(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a linear module's forward as bitsandbytes computes it in 8 bits (LLM.int8(), Dettmers 2022, §3).

    Each value of the weight and of the input is rounded to a multiple of 1/127 of the largest absolute value
    in its row. Columns in which any input is an outlier are multiplied in 16 bits instead.
    """
    weight = _matrix(module, module.get_parameter("weight").data)
    bias: Tensor | None = getattr(module, "bias", None)

    def rounded(values: Tensor) -> Tensor:
        scale = values.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / 127
        return ((values / scale).round() * scale).to(values.dtype)

    def forward(x: Tensor) -> Tensor:
        is_outlier = x.flatten(0, -2).abs().amax(dim=0) >= _OUTLIER
        small, large = x.masked_fill(is_outlier, 0), x.masked_fill(~is_outlier, 0)
        product = nn.functional.linear(rounded(small), rounded(weight)) + nn.functional.linear(large, weight)
        return product if bias is None else product + bias

    return forward


def _hidden(output: Any) -> Tensor:
    """Return the hidden state from a layer's output, which is a tensor or a tuple that starts with it."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
