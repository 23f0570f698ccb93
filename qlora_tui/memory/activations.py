"""Computes, from the widths of a layer's modules, the memory that the layer saves for its backward and the
memory that it takes in addition.

A layer has two halves, attention (or what replaces it) and the MLP or experts. For each half, the rules give
the tensors that the graph saves, and the fullest moments of forward and backward:

* a norm saves its input (transformers' RMSNorm saves a copy in float32);
* a linear module with an adapter saves its input, once for all modules that read it, and the inputs times A;
  peft also saves a copy in the adapter's dtype; dropout adds a mask; the frozen weight itself needs nothing
  saved;
* a gated MLP saves gate and up (ours), or the operands of its activation and product;
* attention saves queries, keys, values, its output and a number per row, or each step of the scores;
* the backward of a half holds everything saved so far, the gradient of the hidden states, and the temporary
  tensors of its operations.

Sources: ``training/fused`` for our functions; peft ``tuners/lora/layer.py`` and ``bnb.py``, bitsandbytes
``autograd/_functions.py``, transformers ``integrations/moe.py`` and torch's ``derivatives.yaml``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_tui.memory.execution import (
    ATTENTION_BLOCK_ROWS,
    EXTRA_COLUMNS,
    GATED_MLP,
    GROUPS,
    SAMPLE_PADDING_ROWS,
    Kernel,
    accumulator_width,
    flash_trains,
)
from qlora_tui.memory.layout import Block, Heads, Layer, Layout, Linear, Mixture

FLOAT = 4
"""Bytes of a float32."""
INDEX = 8
"""Bytes of an index."""
ACTIVATIONS_IN_STEPS = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 2, "xielu": 4}
"""Number of tensors that transformers' activations save if they compute in steps (``activations.py``)."""
ACTIVATIONS_OF_RESULT = ("relu",)
"""Activations whose backward needs the result, which the next module also saves."""
TRITON_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Activations that the Triton kernel of a gated MLP supports, under their names in configs."""
NORM_STEPS = 3
"""Number of float32 tensors in the backward pass of a norm that is computed in several operations."""

Items = Counter[str]


@dataclass(frozen=True)
class Half:
    """Bytes of one half of a layer, by item."""

    saved: Items
    """Tensors that the graph saves from the half's forward to its backward."""
    kept: Items
    """The part of the saved tensors that stays even if the layer is recomputed."""
    forward: Items
    """Bytes besides saved tensors, at the fullest moment of the forward."""
    backward: tuple[Items, ...]
    """Bytes at several moments of the backward pass, in addition to the saved tensors and the gradient of the
    hidden states.
    """


class Rules:
    """The rules, applied with the sizes of one run."""

    def __init__(self, layout: Layout) -> None:
        execution = layout.execution
        self._layout, self._execution = layout, execution
        self.tokens, self.hidden = layout.tokens, layout.hidden
        self.compute = execution.compute_itemsize
        self.hidden_size = execution.residual_itemsize
        """Bytes per element of the hidden states and of norms' outputs."""
        unquantized = layout.recipe.quantization.method == "none"
        self.size = self.compute if execution.autocast and unquantized else self.hidden_size
        """Bytes per element of linear modules' outputs. A module with packed weights casts its output to the
        dtype of its input.
        """
        self.dropout = layout.recipe.lora.dropout > 0
        self.own = execution.own_fused
        self.cuda = execution.device == "cuda"

    # Linear modules

    def is_fused(self, module: Linear) -> bool:
        """Return whether one of our fused functions computes the module together with its adapter. False for
        DoRA and for 8-bit weights.
        """
        return self.own and bool(module.rank) and not module.dora and module.method != "int8"

    def are_grouped(self, modules: Sequence[Linear]) -> bool:
        """Return whether our fused function computes these modules together. False with dropout."""
        names = {module.name for module in modules}
        return not self.dropout and all(map(self.is_fused, modules)) and any(map(names.issubset, GROUPS))

    def read(self, modules: Iterable[Linear], width: int, *, is_saved: bool = False) -> tuple[Items, Items]:
        """Return the bytes saved by modules that read the same tensor, and the part that recomputation keeps.

        Args:
            modules: the modules.
            width: elements of the tensor for each token.
            is_saved: whether another operation saves the tensor already.
        """
        tokens, compute = self.tokens, self.compute
        size = self.hidden_size if width == self.hidden else self.size
        autocast = self._execution.autocast
        saved, kept = Items(), Items()
        numel, keeps = tokens * width, False
        for module in modules:
            if module.method == "int8":
                kept["int8_inputs"] = numel * size
            if not module.rank:
                continue
            if self.is_fused(module):
                keeps = True
                saved["adapter_inputs"] += tokens * module.rank * self.narrow
                saved["dropout"] += numel * self.dropout
                continue
            itemsize, copied = size, self.dropout
            if not (autocast and module.method != "none") and itemsize != FLOAT:
                itemsize, copied = FLOAT, True
            if self.dropout:
                saved["dropout"] += numel * (1 if self.cuda else itemsize)
            if autocast and itemsize != compute:
                itemsize, copied = compute, True
            if copied:
                saved["dropout" if self.dropout else "adapter_inputs"] += numel * itemsize
            keeps |= not copied
            saved["adapter_inputs"] += tokens * module.rank * self.narrow
            if module.dora:
                saved["adapter_inputs"] += 2 * tokens * module.outputs * FLOAT
        if keeps and not (is_saved or kept):
            saved["activations"] += numel * size
        if not is_saved:
            saved += kept
        return saved, Items() if self._execution.reentrant else kept

    @property
    def narrow(self) -> int:
        """Return the bytes per element of the product of inputs and A."""
        if self.own or self._execution.autocast:
            return self.compute
        return FLOAT

    def dequantized(self, module: Linear, *, backward: bool = True) -> int:
        """Return the bytes of the frozen weight while it is dequantized for a product."""
        if module.method in ("nf4", "fp4") or (module.method == "int8" and backward):
            return module.weights * self.compute
        return 0

    def product(self, module: Linear) -> Items:
        """Return the bytes that the forward of a module takes besides saved tensors, its outputs included."""
        outputs = self.tokens * module.outputs
        items = Items(activations=outputs * self.size, dequantized=self.dequantized(module, backward=False))
        if module.method == "int8" and self.cuda:
            items["activations"] += outputs * FLOAT
        if module.rank and not self.is_fused(module):
            items["adapter_inputs"] += outputs * (self.narrow + self.size)
        return items

    def differentiated(self, modules: Sequence[Linear], *, together: bool = False) -> list[Items]:
        """Return the fullest moments of the backward of modules that read the same tensor, in any order.

        The gradients of their outputs are counted elsewhere.

        Args:
            together: whether one function computes the modules.
        """
        moments = []
        size = self.size
        more = len(modules) > 1 and not together
        for module in modules:
            numel, outputs = self.tokens * module.inputs, self.tokens * module.outputs
            earlier = Items(activations=numel * size * more)
            product = Items(dequantized=self.dequantized(module), activations=numel * size)
            if self.is_fused(module) or not module.rank:
                moments.append(earlier + product)
                if module.rank and self.dropout:
                    moments.append(earlier + Items(activations=numel * size, dropout=2 * numel * size))
                continue
            wide = self.narrow
            scaled = outputs * wide * (2 if wide != size else 1)
            moments.append(earlier + Items(adapter_inputs=scaled))
            through = numel * (wide * (2 if self.dropout else 1) + size * (wide != size))
            moments.append(earlier + Items(adapter_inputs=through))
            cast = (outputs + numel) * self.compute if size != self.compute else 0
            moments.append(earlier + product + Items(adapter_inputs=numel * size, activations=cast))
        return moments

    # Norms

    def norms(self, widths: Iterable[int]) -> Items:
        """Return the bytes that norms over inputs of these widths save."""
        layout = self._layout
        if layout.architecture.own_norms:  # the deviation from the mean, which two steps save
            return Items(activations=2 * FLOAT * self.tokens * sum(widths))
        size = self.hidden_size if self.own or layout.layer_norm else FLOAT
        return Items(activations=self.tokens * sum(width * size + FLOAT for width in widths))

    @property
    def norm_shares_input(self) -> bool:
        """Return whether a norm saves the hidden states themselves, not a copy in float32."""
        if self._layout.architecture.own_norms:
            return False
        return self.own or self._layout.layer_norm or self.hidden_size == FLOAT

    def norm_backward(self, width: int) -> Items:
        """Return the bytes that the backward of a norm takes."""
        numel = self.tokens * width
        if self._layout.layer_norm or self._execution.triton:
            return Items(activations=numel * self.hidden_size)
        return Items(activations=NORM_STEPS * numel * FLOAT)

    # Halves

    def attention(self, layer: Layer) -> Half:
        """Return the half that mixes tokens: attention, a mixer, or both."""
        parts = []
        if layer.attention and layer.heads:
            parts.append(self._attention(layer.attention, layer.heads))
        if layer.mixer:
            parts.append(self._mixer(layer))
        return _one_after_another(parts)

    def _read_inner(self, block: Block) -> tuple[Items, Items]:
        """Return the bytes that all modules of a block except the last one save, and the part of these bytes
        that recomputation keeps.
        """
        saved, kept = self.read(block.first, self.hidden)
        for module in block.middle:
            more, pinned = self.read((module,), module.inputs)
            saved, kept = saved + more, kept + pinned
        return saved, kept

    def _attention(self, block: Block, heads: Heads) -> Half:
        size, execution = self.size, self._execution
        kernel = attention_kernel(self._layout, heads)
        saved, kept = self._read_inner(block)
        scores = self._scores(heads, kernel)
        saved += scores.saved
        if block.middle:  # values are a view of the output that also has the keys
            saved["activations"] += self.tokens * max(block.middle[-1].outputs - heads.value, 0) * size
        if heads.joined and heads.rotary and not execution.autocast:
            saved["activations"] += self.tokens * 2 * heads.key * size
        if heads.gate:
            saved["activations"] += self.tokens * (heads.gate + heads.output) * size
        moments = [items + Items(activations=self.tokens * heads.output * size) for items in scores.backward]
        if block.last:
            shares = kernel in ("flash", "efficient") and not self._joins_samples and not heads.gate
            more, pinned = self.read((block.last,), block.last.inputs, is_saved=shares)
            saved, kept = saved + more, kept + pinned
            moments += self.differentiated((block.last,))
        together = self.are_grouped(block.first)
        widths = heads.query + heads.key + heads.value
        gradients = Items(activations=self.tokens * widths * size)
        freed = Items(scores.saved)
        for moment in self.differentiated(block.first, together=together):
            moment.update(gradients)
            moment.subtract(freed)
            moments.append(moment)
        forward = max((self.product(module) for module in block.modules), key=Items.total)
        return Half(saved, kept, max(forward, scores.forward, self._index(), key=Items.total), tuple(moments))

    def _index(self) -> Items:
        """Return the bytes of the scores with which each token chooses the tokens to attend to.

        The forward holds them twice in float32, raw and weighted (``DeepseekV32Indexer``).
        """
        layout = self._layout
        return Items(scores=2 * FLOAT * layout.architecture.index_heads * layout.length**2 * layout.rows)

    @property
    def _joins_samples(self) -> bool:
        """Return whether samples are attended to separately, and their outputs joined in a copy."""
        execution, layout = self._execution, self._layout
        return execution.segments and layout.rows > 1 and not takes_one_call(layout)

    def _scores(self, heads: Heads, kernel: Kernel) -> Half:
        """Return the bytes that the kernel saves, and those that it takes in addition.

        It saves queries, keys, values, output, and one number per row.
        """
        execution, tokens, size = self._execution, self.tokens, self.size
        if kernel != "eager" and ((kernel == "flash" and self.cuda) or execution.autocast):
            size = self.compute
        statistic = tokens * heads.heads * FLOAT
        repeats = kernel in ("efficient", "eager") and heads.is_grouped
        key, value = (heads.query, heads.output) if repeats else (heads.key, heads.value)
        inputs = tokens * (heads.query + key + value) * size
        if kernel in ("eager", "math"):
            return self._written_out(heads, inputs, kernel)
        saved = Items(activations=inputs + tokens * heads.output * size + statistic)
        backward = Items(activations=inputs + statistic)
        if not self.cuda:
            if size < FLOAT and not execution.float16 and heads.query == heads.output:
                backward += self._by_blocks(heads, size)
            return Half(saved, Items(), Items(), (backward,))
        if size < FLOAT:  # the gradient of q is summed in float32
            sums = tokens * heads.query * FLOAT
            if takes_one_call(self._layout):
                samples = execution.samples or self._layout.rows
                rows = (tokens + SAMPLE_PADDING_ROWS * samples) * heads.heads
                sums = rows * (accumulator_width(heads.query // heads.heads) + 1) * FLOAT - statistic
            backward["activations"] += sums
        if heads.is_grouped and kernel == "flash":  # k and v have a gradient per query head
            backward["activations"] += tokens * (heads.query + heads.output) * size
        repeated = tokens * (heads.key + heads.value) * size if repeats else 0
        return Half(saved, Items(), Items(activations=repeated), (backward,))

    def _written_out(self, heads: Heads, inputs: int, kernel: Kernel) -> Half:
        """Return the bytes of attention that keeps a tensor for every step of the scores.

        Our trainer attends to one sample after another, transformers to all at once.
        """
        layout, size = self._layout, self.size if kernel == "eager" else FLOAT
        samples = layout.rows if self._execution.attention == "eager" else 1
        one = heads.heads * layout.length**2 * (samples if kernel == "eager" else layout.rows)
        every = heads.heads * layout.length**2 * layout.rows
        half = self._execution.float16 and self.cuda and size < FLOAT
        # A GPU first multiplies gradient and result of the softmax.
        tensors = 3 if self.cuda else 2
        # The softmax in float32, and a narrower copy for the product.
        saved = Items(scores=every * (FLOAT + size * (size != FLOAT)))
        saved["scores"] += every * size * heads.softcap
        saved["activations"] += inputs
        # Before the softmax: its copy in float32, and its result. After it: its gradient in three tensors.
        forward = Items(scores=one * (size + FLOAT * (not half)))
        backward = Items(scores=one * (2 * FLOAT if half else tensors * FLOAT - size * (size != FLOAT)))
        return Half(saved, Items(), forward, (backward,))

    def _by_blocks(self, heads: Heads, size: int) -> Items:
        """Return the bytes that the backward of our bfloat16 attention takes for one sample on a CPU.

        It computes one block of queries at a time (``training/fused/cpu_attention.py``).
        """
        layout = self._layout
        length, block = layout.length, min(ATTENTION_BLOCK_ROWS, layout.length)
        columns = 2 * (heads.query + heads.key) + EXTRA_COLUMNS * heads.heads * 4
        numel = length * (columns + heads.key) + block * 2 * heads.query + 2 * length * heads.key
        numel += 2 * EXTRA_COLUMNS * self.tokens * heads.heads
        return Items(activations=numel * size, scores=2 * heads.heads * block * length * size)

    def _mixer(self, layer: Layer) -> Half:
        """Return the bytes of a mixer, whose projections are saved, convolved, and combined in float32."""
        size, block = self.size, layer.mixer
        assert block
        saved, kept = self._read_inner(block)
        if block.last:
            more, pinned = self.read((block.last,), block.last.inputs)
            saved, kept = saved + more, kept + pinned
        projected = self.tokens * block.first_width
        saved["activations"] += (projected + self.tokens * layer.convolved) * size
        states = self.tokens * max(block.first_width, block.width) * FLOAT
        chunks = self.tokens * layer.state_width * FLOAT
        saved["activations"] += MIXER_STATES[chunks > 0] * states + CHUNK_STATES * chunks
        moments = [Items(activations=states + chunks), *self.differentiated(block.modules)]
        return Half(saved, kept, Items(activations=states + chunks), tuple(moments))

    def feed_forward(self, layer: Layer, activation: str) -> Half:
        """Return the half that transforms each token: MLPs and experts, one after another."""
        # With a single norm both halves read its output.
        mixes = layer.attention or layer.mixer
        shares = bool(mixes) and sum(width == self.hidden for width in layer.norms) == 1
        parts = [
            self._mlp(
                block,
                activation,
                shares_input=shares,
                has_norm=block.width != self.hidden and block.width in layer.norms,
            )
            for block in layer.mlps
        ]
        if layer.mixture:
            parts.append(self._experts(layer.mixture, activation))
        return _one_after_another(parts)

    def _mlp(self, block: Block, activation: str, *, shares_input: bool, has_norm: bool) -> Half:
        """Return the bytes of one MLP.

        Args:
            block: its modules.
            activation: name of the activation.
            shares_input: whether it reads the same input as attention.
            has_norm: whether there is a norm before the last projection.
        """
        size, width = self.size, self.tokens * block.width
        saved, kept = self.read(block.first, self.hidden, is_saved=shares_input)
        if shares_input:
            kept = Items()
        last = block.last
        steps = self.differentiated(block.first, together=self.are_grouped(block.first))
        named = {module.name for module in block.modules} == set(GATED_MLP)
        if last and named and not has_norm and self.is_fused(last):
            # Our function saves gate and up, and recomputes the rest.
            own, _ = self.read((last,), last.inputs, is_saved=True)
            pinned = Items(adapter_inputs=own["adapter_inputs"])
            saved += own + Items(activations=2 * width * size)
            one_kernel = self._execution.triton and activation in TRITON_ACTIVATIONS
            tensors = (3 if self.dropout else 2) if one_kernel else 4
            moments = [*self.differentiated((last,))[:1], Items(activations=tensors * width * size)]
            forward = Items(activations=(1 if one_kernel else 2) * width * size)
            freed = Items()  # two gradients that replace gate and up
        else:
            tensors = ACTIVATIONS_IN_STEPS.get(activation, 1)
            of_result = activation in ACTIVATIONS_OF_RESULT
            saved["activations"] += width * size * (tensors + 2 * block.gated)
            more = Items()
            pinned = Items()
            if last:
                more, pinned = self.read((last,), last.inputs, is_saved=of_result and not block.gated)
            saved += more
            moments = self.differentiated((last,)) if last else []
            moments.append(Items(activations=(3 if block.gated or tensors > 1 else 2) * width * size))
            if last and not last.rank:
                # The backward needs no saved tensors, so its gradient already exists when the layer is
                # recomputed.
                weight = max(map(self.dequantized, block.first), default=0)
                entering = self.tokens * self.hidden * self.hidden_size
                moments.append(
                    Items(dequantized=weight, activations=entering + width * size * (not block.gated))
                )
            forward = Items(activations=2 * width * size)
            gradients = 1 + block.gated
            freed = more + Items(activations=(tensors + 2 * block.gated - gradients) * width * size)
        for moment in steps:
            moment.subtract(freed)
            moments.append(moment)
        if last:
            forward = max(forward, self.product(last), key=Items.total)
        return Half(saved, kept + pinned, forward, tuple(moments))

    def _experts(self, mixture: Mixture, activation: str) -> Half:
        """Return the bytes of routed experts, assuming that tokens are spread evenly over them."""
        tokens, hidden, size = self.tokens, self.hidden, self.size
        slots = tokens * mixture.per_token
        inner, outer = slots * mixture.intermediate, slots * hidden
        routed = Items(activations=tokens * mixture.experts * FLOAT + slots * (FLOAT + 2 * INDEX))
        if mixture.is_one_at_a_time:
            return self._experts_in_turn(mixture, routed)
        # Gate and up (whose operands activation and product save), and the outputs, which the product with
        # the routing weights saves; gpt-oss's clamped gate has three more steps.
        steps = 6 if mixture.has_biases else 3
        saved = routed + Items(activations=(steps * inner + outer) * size)
        backward = Items(activations=3 * outer * size)
        forward = Items(activations=2 * outer * size)
        inside = Items(activations=(outer + 2 * inner) * size)
        matrix = Items()
        kept = Items()
        if mixture.separate and mixture.method != "none":
            matrix["dequantized"] = hidden * mixture.intermediate * self.compute
            if mixture.method == "int8" and not self._execution.reentrant:
                kept["int8_inputs"] = (outer + inner) * size
        return Half(saved + kept, kept, forward + matrix, (backward + matrix, inside + matrix))

    def _experts_in_turn(self, mixture: Mixture, routed: Items) -> Half:
        """Return the bytes of our function, which computes one expert at a time and saves gate and up."""
        tokens, hidden, size = self.tokens, self.hidden, self.compute
        slots = tokens * mixture.per_token
        rows = -(-slots // mixture.experts)
        saved = routed + Items(activations=tokens * hidden * self.size)
        saved["activations"] += slots * 2 * mixture.intermediate * size
        matrix = 0
        if mixture.method != "none":
            weights = 2 * mixture.intermediate * hidden
            matrix = weights * size + weights // 64 * FLOAT
        one = rows * (3 * mixture.intermediate + 2 * hidden) * size + rows * hidden * FLOAT
        total = tokens * hidden * FLOAT
        widths = (hidden + 2 * mixture.intermediate, mixture.intermediate + hidden)
        factors = mixture.experts * sum(
            rank * width for rank, width in zip(mixture.ranks, widths, strict=True)
        )
        forward = Items(activations=total + one, dequantized=matrix)
        # The gate's result and saved tensors, its gradient, and the gradients of its inputs.
        gate = rows * 7 * mixture.intermediate * size
        backward = Items(
            activations=total + max(one, gate) + 2 * slots * FLOAT,
            dequantized=matrix,
            gradients=factors * FLOAT,
        )
        return Half(saved, Items(), forward, (backward,))


MIXER_STATES = {False: 3, True: 5}
"""Number of float32 tensors that a mixer without and with a state saves, each as wide as its projection.

This is for the code of transformers that runs if the mixer's kernels are not installed. Measured on traces,
like ``CHUNK_STATES``.
"""
CHUNK_STATES = 4
"""Number of float32 tensors that a mixer with a state saves for its states and products.

Each holds the states of all heads, and the products of each token with the tokens of its chunk
(``mamba2_chunk_scan``, ``torch_chunk_gated_delta_rule``). The computed memory is within 6 % of the traces for
Bamba, Falcon-H1, Granite 4, Nemotron-H, Qwen3.5 and Kimi Linear.
"""


def attention_kernel(layout: Layout, heads: Heads) -> Kernel:
    """Return the kernel that computes a layer's attention."""
    execution = layout.execution
    kernel = execution.attention
    if kernel == "eager":
        return kernel
    if execution.own_fused and (heads.softcap or heads.sinks):
        return "eager"  # no fused kernel supports capped scores or sinks
    if layout.architecture.own_attention or (execution.device == "cpu" and heads.key != heads.value):
        return "math"  # a CPU's kernel requires values as wide as keys
    narrow = execution.device == "cuda" and not flash_trains(
        execution.capability, heads.query // max(heads.heads, 1)
    )
    return "efficient" if kernel == "flash" and narrow else kernel


def takes_one_call(layout: Layout) -> bool:
    """Return whether one kernel attends to all samples of a packed sequence."""
    execution, architecture = layout.execution, layout.architecture
    trains = execution.device == "cpu" or flash_trains(execution.capability, architecture.head_dim)
    return execution.varlen and trains and not architecture.attention_dropout


def _one_after_another(parts: Sequence[Half]) -> Half:
    """Return several consecutive parts of a half as one half. The backward pass begins with the last part."""
    saved, kept, forward = Items(), Items(), Items()
    moments: list[Items] = []
    whole = Items()
    for part in parts:
        whole += part.saved
    below = Items()
    for part in parts:
        below += part.saved
        kept += part.kept
        forward = max(forward, part.forward, key=Items.total)
        for moment in part.backward:
            lower = Items(moment)
            lower.subtract(whole)
            lower.update(below)
            moments.append(lower)
        saved += part.saved
    return Half(saved, kept, forward, tuple(moments))
