"""Types of a chat: settings, results, sources, and the effect of an adapter. Loads no torch.

Used by the chat itself, by the engine's protocol, and by the user interfaces.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from qlora_tui.formatting import format_loss, format_percent, format_small_percent
from qlora_tui.recipe.schema import Recipe, Thinking

BASE = "base"
"""Adapter name of the model without an adapter."""
ADAPTER = "adapter"
"""Adapter name of a run's final adapter. Checkpoints are named ``step-120``."""

FinishReason: TypeAlias = Literal["turn end", "most tokens", "context full", "stopped"]
"""Why an answer ended: end of turn, ``max_new_tokens``, the model's context length, or a stop request."""


class Sampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling settings. The defaults suit a conversation."""

    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.7
    """Sampling temperature; 0 always selects the most likely token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    """Total probability of the most likely tokens to sample from (top-p); 1 includes all."""
    top_k: Annotated[int, Meta(ge=0)] = 50
    """Number of most likely tokens to sample from (top-k); 0 includes all."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    """Repetition penalty; above 1, tokens already in the conversation become less likely
    (arXiv:1909.05858, 4.1)."""
    max_new_tokens: Annotated[int, Meta(ge=1)] = 512
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    """Random seed; the same seed and conversation give the same answer on one machine. None is random."""


GREEDY = Sampling(temperature=0.0)
"""Settings that always select the most likely token, for comparisons."""


class ThinkingSupport(Struct, frozen=True, kw_only=True):
    """How a model's chat template supports thinking."""

    kind: Literal["switch", "effort", "always", "none"] = "none"
    """``switch``: on or off; ``effort``: can only be lowered; ``always``: always on; ``none``:
    unsupported."""
    variable: str = ""
    """Name of the template variable for thinking, such as ``enable_thinking``; empty if there is none."""
    off: str = ""
    """Value of ``variable`` that turns thinking off or lowers it most, such as ``False`` or ``low``."""
    default: Literal["on", "off"] = "off"

    def effect_of(self, thinking: Thinking) -> str:
        """Return a sentence on the effect of a thinking setting with this template.

        It is empty if the setting does what its name says.
        """
        if thinking == "auto" or self.kind == "switch":
            return ""
        if self.kind == "none":
            return (
                f"Turning thinking {thinking} has no effect: this model's chat template has no switch for it."
            )
        if self.kind == "always":
            return (
                f"Turning thinking {thinking} has no effect: this model's chat template always opens a "
                "thinking block."
            )
        if thinking == "off":
            return (
                f"Thinking cannot be turned off for this model; the prompt sets {self.variable} = {self.off}."
            )
        return ""


class GenerationResult(Struct, frozen=True, kw_only=True):
    """Result of generating one answer."""

    ending: FinishReason
    text: str
    """The answer, without thoughts."""
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that were processed for the previous turn and are reused."""
    new_tokens: int
    first_token_s: float
    """Seconds from the question to the first token."""
    tokens_per_s: float
    """Tokens per second after the first; 0 if there was only one."""
    thought: str = ""
    """The thought before the answer."""
    thought_tokens: int = 0
    thought_s: float = 0.0
    recorded_tokens: int = 0
    """Tokens that a CUDA graph has processed."""
    warning: str = ""
    """Warning if the chat's logits differed from those of transformers and peft, or could not be compared
    with them; empty otherwise.
    """
    note: str = ""
    """Why answers are generated without a CUDA graph; only in the first result after this is known."""
    thought_ended: bool = True
    """Whether the thought was complete when the answer stopped."""


class OptionProbability(Struct, frozen=True):
    """One option with its probability."""

    option: str
    probability: float


class Decided(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A decision between options."""

    options: tuple[OptionProbability, ...]
    """All options, the most probable first."""
    fields: dict[str, tuple[OptionProbability, ...]] = {}
    """Values of each field, the most probable first; only for options that are objects."""
    is_calibrated: bool = False
    """Whether the probabilities were calibrated on validation rows."""

    @property
    def best(self) -> OptionProbability:
        """Return the most probable option."""
        return self.options[0]


class AnswerComparison(Struct, frozen=True, kw_only=True):
    """Answers of the base and of the adapter to the same question."""

    prompt: str
    turn: int
    """Position of the question in its conversation, from 1."""
    base: str | None
    """Answer of the base; None if the base was not asked."""
    adapter: str
    adapter_ended: bool
    """Whether the adapter ended its turn, instead of reaching the token limit."""


class ChatSource(Struct, frozen=True, kw_only=True):
    """What to load: the recipe's base model, and adapters for it."""

    recipe: Recipe
    adapters: dict[str, str] = {}
    """Folder of each adapter, by name. An adapter is loaded on first use."""
    gguf_files: dict[str, str] = {}
    """Exported GGUF files by name, such as ``Q8_0.gguf``. llama.cpp runs these."""
    thinking: Thinking = "auto"
    """Thinking setting that was used in training."""

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Return every adapter name, the base first."""
        return (BASE, *self.adapters)

    @property
    def answer_names(self) -> tuple[str, ...]:
        """Return the names of everything that can answer: base, adapters and GGUF files."""
        return (*self.adapter_names, *self.gguf_files)


_NEGLIGIBLE = 0.01
"""Share of changed choices below which an adapter is reported to have practically no effect."""
_NAMED = 3
"""Maximum number of trained tokens that :attr:`Effect.sentence` names."""


class LayerChange(Struct, frozen=True, kw_only=True):
    """Change of the weights of one layer by an adapter."""

    layer: int
    relative: float
    """‖ΔW‖ / ‖W‖ over all its changed weights, Frobenius norms."""


class Effect(Struct, frozen=True, kw_only=True):
    """Comparison of the base and an adapter on the same held-out conversations."""

    adapter_name: str
    samples: int
    tokens: int
    """Number of next-token choices compared, all of which count in the loss."""
    mean_kl: float
    """KL(adapter ‖ base) of the next-token distributions, in nats, mean over the choices."""
    changed_choices: float
    """Share of the choices at which the most likely token differs."""
    base_loss: float
    adapter_loss: float
    """Mean cross-entropy of the held-out answers with the adapter, in nats per token."""
    turns: int
    """Number of turn ends among the choices; 0 if the template has none."""
    turns_ended: int
    """Number of these turn ends that the adapter predicts."""
    turns_ended_by_base: int
    warning: str = ""
    """Warning if the logits behind these figures differ from the logits of transformers and peft, or could
    not be compared with them; empty otherwise.
    """
    token_rows: tuple[str, ...] = ()
    """Tokens whose rows in the embedding and head were trained."""
    layers: tuple[LayerChange, ...]

    @property
    def sentence(self) -> str:
        """Return a one-sentence summary for readers who skip the figures."""
        where = f"{self.samples} held-out conversation{'s' if self.samples != 1 else ''}"
        much = format_percent(self.changed_choices)
        verb = "changes"
        if self.changed_choices < _NEGLIGIBLE:
            verb, much = "hardly changes the model:", format_small_percent(self.changed_choices)
        moved = f"The {self._name}{self._rows} {verb} {much} of next-token choices on {where}"
        fits = self.adapter_loss < self.base_loss
        better = "better" if fits else "worse"
        loss = (
            f"it fits them {better} (loss {format_loss(self.base_loss)} → {format_loss(self.adapter_loss)})"
        )
        if not self.turns:
            return f"{moved}; {loss}."
        ends = self.turns_ended == self.turns
        turns = "ends its turns" if ends else f"ends only {self.turns_ended} of {self.turns} turns"
        return f"{moved}; {loss} {'and' if fits == ends else 'but'} {turns}."

    @property
    def _rows(self) -> str:
        if not self.token_rows:
            return ""
        others = len(self.token_rows) - _NAMED
        more = f" and {others} more" if others > 0 else ""
        return f", with trained rows for {', '.join(self.token_rows[:_NAMED])}{more},"

    @property
    def _name(self) -> str:
        return (
            "adapter"
            if self.adapter_name == "adapter"
            else f"checkpoint of step {self.adapter_name.removeprefix('step-')}"
        )
