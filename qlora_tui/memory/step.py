"""Models one training step: the profile of each kind of layer and of the loss, and the possible peak moments.

The bytes alive in layer ``l`` are those that earlier layers keep, the gradients of later layers, and the
layer's own. The first two are sums over layers, so one profile for each kind of layer is enough. A step
traced on the meta device (``engine/trace_worker.py``) can replace the profiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qlora_tui.catalog.architecture_types import Architecture
from qlora_tui.memory.activations import FLOAT, Items, Rules
from qlora_tui.memory.execution import (
    ADAPTER_ITEMSIZE,
    LOSS_BLOCK_ROWS,
    LOSS_CHUNK_ROWS,
    ExecutionConfig,
    liger_rows,
)
from qlora_tui.memory.layout import Layer, Layout, build_layout
from qlora_tui.memory.static_memory import adapter_bytes, optimizer_step_bytes
from qlora_tui.memory.weights import round_to_block
from qlora_tui.recipe.schema import Data, Quantization, Recipe
from qlora_tui.recipe.training_settings import Training

ANSWER_TOKENS = 48
"""Maximum number of tokens of an answer to a general prompt, for the forgetting curve."""
PROMPT_TOKENS = 64
"""Maximum number of tokens of a general prompt, including the text that most chat templates add."""


@dataclass(frozen=True)
class PartProfile:
    """Memory of one part of the step, by item."""

    retained: Items
    """Bytes between the part's forward and its backward, including its input."""
    forward: Items
    """Bytes at the peak of the part's forward, including its input."""
    backward: Items
    """Bytes at the peak of the part's backward, including its input."""
    held: Items = field(default_factory=Counter)
    """Bytes that stay after the part's backward, such as logits that the caller still refers to."""
    gradient_bytes: int = 0
    """Bytes of the gradients that the part's backward allocates; 0 if gradients accumulate."""


@dataclass(frozen=True)
class StepProfile:
    """The parts of a step."""

    layers: tuple[PartProfile, ...]
    """Layers in order; equal layers are the same object."""
    head: PartProfile
    """Final norm, output head and loss."""


Phase = Literal["loading", "forward", "loss", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("loading", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Moment:
    """Memory at one time: either of a step's temporary tensors only, or of the whole process."""

    phase: Phase
    name: str
    """Name of the moment, such as ``forward of layer 0`` or ``optimizer step``.

    Other examples are ``loss forward``, ``loss backward``, ``backward of layer 31``, ``backward of the
    embedding``, ``answers to general prompts`` and ``loading``.
    """
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


def step_moments(step_profile: StepProfile, layout: Layout, *, every_layer: bool = False) -> list[Moment]:
    """Return the moments that may be the peak, in order of time, without constant tensors.

    With ``every_layer`` there is one moment for the forward of each layer, instead of only the first and
    last.
    """
    moments = peak_candidates(step_profile, layout, every_layer=every_layer)
    # Accumulated gradients exist all the time.
    optimizer = {
        "gradients": 0 if layout.execution.accumulates else adapter_bytes(layout),
        "optimizer_step": optimizer_step_bytes(layout),
    }
    return [*moments, Moment("optimizer", "optimizer step", optimizer)]


def answers_moment(layout: Layout) -> Moment:
    """Return the moment when all general prompts are being answered, for the forgetting curve.

    They are answered together, between two steps and without gradients, so their memory is that of keys and
    values. Comparing the answers takes less memory than a step with as many tokens.
    """
    execution = layout.execution
    tokens = execution.general_prompts * (PROMPT_TOKENS + ANSWER_TOKENS)
    widths = (layer.heads.key + layer.heads.value for layer in layout.layers if layer.heads)
    items = {"kv_cache": tokens * sum(widths) * execution.compute_itemsize}
    return Moment("optimizer", "answers to general prompts", items)


def peak_candidates(step_profile: StepProfile, layout: Layout, *, every_layer: bool = False) -> list[Moment]:
    """Return every moment of forward and backward that may be the peak, in order of time."""
    execution = layout.execution
    order, head, last = step_profile.layers, step_profile.head, len(step_profile.layers) - 1
    persistent = Counter(
        adapter=sum(adapter_copies(layout)),
        # One input more than the computed layer's, which is being copied to or from the host.
        checkpoints=layer_input_bytes(layout) if execution.offloads_inputs else 0,
    )
    cast = _autocast_copies(layout)
    before = Counter(persistent)
    candidates: list[Moment] = []
    below: list[Counter[str]] = []
    for index, profile in enumerate(order):
        below.append(Counter(before))
        if every_layer or index in (0, last):
            items = before + cast + Counter(profile.forward)
            candidates.append(Moment("forward", f"forward of layer {index}", dict(items)))
        before.update(profile.retained)
        if not index:
            # The embedding's output requires gradients, so the graph holds it as a leaf; if something is
            # added to it, the first layer's input is a separate tensor.
            if layout.modifies_embedding:
                before["activations"] += layer_input_bytes(layout)
            before["activations"] += layout.tokens * layout.token_rows  # index of each token's trained row
    candidates.append(Moment("loss", "loss forward", dict(before + cast + Counter(head.forward))))
    candidates.append(Moment("loss", "loss backward", dict(before + Counter(head.backward))))
    held = Counter(head.held)
    gradients = 0 if execution.accumulates else layout.token_rows * layout.hidden * ADAPTER_ITEMSIZE
    for index in range(last, -1, -1):
        profile = order[index]
        items = below[index] + held + Counter(profile.backward) + Counter(gradients=gradients)
        candidates.append(Moment("backward", f"backward of layer {index}", dict(items)))
        gradients += profile.gradient_bytes
        held.update(profile.held)
    if layout.trained_matrix:
        items = persistent + held + Counter(gradients=gradients) + _embedding_gradient(layout)
        candidates.append(Moment("backward", "backward of the embedding", dict(items)))
    return candidates


def _embedding_gradient(layout: Layout) -> Counter[str]:
    """Return the bytes of the backward of a trained embedding (``training/embeddings.py``).

    These are the gradients of the looked-up rows, three copies of them (in fp32, sorted, and summed), and the
    full gradient matrix if it is not allocated yet.
    """
    execution = layout.execution
    looked_up = layout.tokens * layout.hidden * (execution.compute_itemsize + 3 * ADAPTER_ITEMSIZE)
    is_first = layout.own_head and not execution.accumulates
    matrix = layout.trained_matrix * ADAPTER_ITEMSIZE if is_first else 0
    return Counter(activations=looked_up, gradients=matrix)


def _autocast_copies(layout: Layout) -> Counter[str]:
    """Return the bytes of autocast's copies of trained float32 weights, which are kept until the loss.

    Our fused LoRA function casts the weights itself, so autocast keeps no copies.
    """
    execution = layout.execution
    casts = execution.autocast and execution.compute_itemsize != ADAPTER_ITEMSIZE
    if not casts or execution.own_fused:
        return Counter()
    return Counter(adapter=layout.adapter_parameters * execution.compute_itemsize)


def layer_input_bytes(layout: Layout) -> int:
    """Return the bytes of the hidden states between two layers."""
    execution = layout.execution
    return layout.tokens * layout.hidden * execution.residual_itemsize


def adapter_copies(layout: Layout) -> list[int]:
    """Return the bytes of each of our copies of LoRA weights in the compute dtype.

    The copies are made in ``training/fused/lora.py``.
    """
    execution = layout.execution
    if not execution.own_fused or execution.compute_itemsize >= ADAPTER_ITEMSIZE:
        return []
    return [round_to_block(count * execution.compute_itemsize) for count in layout.lora_tensors]


def profile_step(layout: Layout) -> StepProfile:
    """Apply the rules to each kind of layer, and to the loss."""
    execution, rules = layout.execution, Rules(layout)
    profiles: dict[tuple[int, bool], PartProfile] = {}
    layers = []
    first_kept = len(layout.layers) - execution.kept_layers
    for index, layer in enumerate(layout.layers):
        checkpointed = execution.checkpointing and index < first_kept
        key = (id(layer), checkpointed)
        if key not in profiles:
            profiles[key] = _profile_layer(layout, rules, layer, checkpointed=checkpointed)
        layers.append(profiles[key])
    return StepProfile(tuple(layers), _profile_head(layout, rules))


def _profile_layer(layout: Layout, rules: Rules, layer: Layer, *, checkpointed: bool) -> PartProfile:
    """Return one layer's profile: its halves, the norms between them, and its input."""
    execution, hidden_bytes = layout.execution, layer_input_bytes(layout)
    first, second = rules.attention(layer), rules.feed_forward(layer, layout.architecture.activation)
    norms = rules.norms(layer.norms)
    dropped = Items(
        activations=layout.tokens * layout.hidden * 2 * bool(layout.architecture.residual_dropout)
    )
    if rules.norm_shares_input and layer.norms:
        norms["activations"] -= min(hidden_bytes, norms["activations"])
    # Half of the norms, and at least those over heads, come before or in attention.
    below = Items({key: size // 2 for key, size in (norms + dropped).items()})
    saved = Items()
    for part in (norms, dropped, first.saved, second.saved):
        saved.update(part)
    entering = Items(checkpoints=hidden_bytes) if checkpointed else Items(activations=hidden_bytes)
    if not checkpointed and not rules.norm_shares_input:
        entering = Items()
    gradient = Items(activations=hidden_bytes)
    norm = rules.norm_backward(layout.hidden)
    moments = []
    for moment in (*second.backward, norm):
        moments.append(_sum(entering, saved, gradient, moment))
    for moment in (*first.backward, norm):
        moments.append(_sum(entering, below, first.saved, gradient, moment))
    backward = max(moments, key=Items.total)
    if checkpointed and execution.reentrant:
        backward = _sum(backward, gradient)
    working = max(
        _sum(first.saved, first.forward), _sum({} if checkpointed else saved, second.forward), key=Items.total
    )
    retained = _sum(entering, first.kept, second.kept) if checkpointed else _sum(entering, saved)
    if checkpointed and execution.offloads_inputs:
        retained.pop("checkpoints", None)
    kept = _sum(first.kept, second.kept)
    return PartProfile(
        retained=retained,
        forward=_sum(entering, gradient, working),
        backward=_sum(backward, kept) if checkpointed else backward,
        held=Items(int8_inputs=kept["int8_inputs"]),
        gradient_bytes=0 if execution.accumulates else _gradient_bytes(layer),
    )


def beyond_rules(architecture: Architecture, saved_bytes: Sequence[int], tokens: int) -> float:
    """Return the largest relative difference between a layer's saved bytes and those that the rules give.

    Args:
        architecture: the model.
        saved_bytes: observed saved bytes of each layer, in transformers' code, 16 bits and without adapter;
            layers with 0 are not compared.
        tokens: number of tokens in the observed forward.
    """
    recipe = Recipe(
        data=Data(max_length=tokens),
        quantization=Quantization(method="none"),
        training=Training(micro_batch_size=1, gradient_accumulation=1),
    )
    execution = ExecutionConfig(checkpointing=False, loss="stock")
    profile = profile_step(build_layout(recipe, architecture, execution, has_adapter=False))
    rules = (layer.retained.total() for layer in profile.layers)
    pairs = zip(saved_bytes, rules, strict=False)
    return max((abs(saved / max(expected, 1) - 1) for saved, expected in pairs if saved), default=0.0)


def _gradient_bytes(layer: Layer) -> int:
    """Return the bytes of the gradients of a layer's adapters."""
    total = 0
    for module in layer.modules:
        if module.rank:
            for width in (module.inputs, module.outputs):
                total += round_to_block(module.rank * width * ADAPTER_ITEMSIZE)
    return total


def _sum(*parts: Mapping[str, int]) -> Items:
    total = Items()
    for part in parts:
        total.update(part)
    return total


def _profile_head(layout: Layout, rules: Rules) -> PartProfile:
    """Return the profile of the final norm, the head and the loss, with every token in the loss."""
    execution, hidden_bytes = layout.execution, layer_input_bytes(layout)
    norm = rules.norms((layout.hidden,))
    if execution.loss == "chunked":
        return _chunked(layout, norm)
    if execution.loss == "liger":
        rows = liger_rows(layout.tokens, layout.hidden, layout.vocabulary)
        states = (2 + bool(layout.architecture.logit_scale)) * hidden_bytes
        both = _sum(norm, {"hidden_gradient": states, "activations": hidden_bytes})
        logits = {"logits": rows * layout.vocabulary * execution.residual_itemsize}
        return PartProfile(both, _sum(both, logits), _sum(both, {"activations": hidden_bytes}))
    return _stock(layout, norm)


def _stock(layout: Layout, norm: Items) -> PartProfile:
    """Return the profile of transformers' loss: logits, a float32 copy, log-softmax, and gradients."""
    execution, architecture = layout.execution, layout.architecture
    size, numel = execution.residual_itemsize, layout.tokens * layout.vocabulary
    if execution.autocast:
        size = execution.compute_itemsize
    weight = 0
    if execution.autocast and execution.residual_itemsize != size:
        weight = layout.vocabulary * layout.hidden * size  # in autocast's dtype, which the product saves
    narrow, wide = numel * size, numel * FLOAT
    copy = wide if size != FLOAT else 0
    shifted = 0 if execution.loss_code == "padded" else (numel - layout.rows * layout.vocabulary) * FLOAT
    rebound = execution.loss_code == "rebound"
    capped = narrow * bool(architecture.final_logit_softcapping)
    held = Items()
    if execution.logits_alive_in_backward:
        held["logits"] = (copy or narrow) if rebound else narrow
    base = _sum(norm, {"head": weight, "logits": capped})
    source = shifted or wide
    # The caller's logits, the model's copy, the loss's shifted copy, and log-softmax.
    forward = (0 if rebound and copy else narrow) + copy + shifted + source
    # Log-softmax, its gradient and the logits' gradient in float32; later the latter in the model's dtype.
    backward = 3 * source
    entering = {"activations": layout.tokens * layout.hidden * size}
    return PartProfile(
        retained=_sum(base, {"logits": source}, held),
        forward=_sum(base, entering, {"logits": forward}),
        backward=_sum(base, held, {"logits": backward}),
        held=held,
    )


def _chunked(layout: Layout, norm: Items) -> PartProfile:
    """Return the profile of our loss (``training/loss.py``).

    The hidden states of the positions in the loss are copied. Their logits are computed one chunk at a time,
    and the gradient of the logits replaces them. The gradient of a trained head stays after the backward,
    unless it is added to that of earlier micro-steps.
    """
    execution, architecture = layout.execution, layout.architecture
    size, hidden_bytes = execution.residual_itemsize, layer_input_bytes(layout)
    numel = layout.tokens * layout.hidden
    gradient = numel * (FLOAT if execution.float16 else size)
    narrow = size if size != FLOAT else 0
    rows = min(LOSS_CHUNK_ROWS, layout.tokens)
    block = min(LOSS_BLOCK_ROWS[execution.device], rows) * layout.vocabulary * FLOAT
    # The float32 logits of a block, in further copies if they are scaled or capped, and their softmax.
    tensors = 1 + bool(narrow or architecture.logit_scale)
    if architecture.final_logit_softcapping:
        tensors = 3
    trained = layout.token_rows * layout.hidden
    chunk = Items(
        logits=(layout.trained_matrix + trained) * narrow
        + rows * (layout.vocabulary * size + layout.token_rows * FLOAT)
        + tensors * block,
    )
    kept = _sum(norm, {"hidden_gradient": gradient + trained * FLOAT})
    kept["gradients"] = layout.trained_matrix * FLOAT
    states = {"activations": hidden_bytes, "hidden_gradient": hidden_bytes}
    is_held = layout.trained_matrix and not execution.accumulates
    return PartProfile(
        retained=kept,
        forward=_sum(kept, states, chunk),
        backward=_sum(kept, {"hidden_gradient": gradient, "activations": 2 * hidden_bytes}),
        held=Items(gradients=layout.trained_matrix * FLOAT) if is_held else Items(),
    )
