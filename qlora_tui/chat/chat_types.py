"""What is said about a chat: settings, how an answer ended, what there is to talk to. Loads no torch.

Used by the chat itself, by the engine's protocol, and by whoever shows a chat.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from qlora_tui.recipe.schema import Recipe, Thinking

BASE = "base"
"""The voice of the model without an adapter."""
ADAPTER = "adapter"
"""The voice of a run's final adapter. A checkpoint's is ``step-120``."""

FinishReason: TypeAlias = Literal["turn end", "most tokens", "context full", "stopped"]
"""Why an answer ended: by itself, at ``max_new_tokens``, at the model's context length, or on request."""


class Sampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen. The defaults are a calm conversation."""

    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.7
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    """Only the likeliest tokens that together have this probability; 1 is all."""
    top_k: Annotated[int, Meta(ge=0)] = 50
    """Only so many of the likeliest tokens; 0 is all."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    """Above 1, tokens already in the conversation become less likely (arXiv:1909.05858, section 4.1)."""
    max_new_tokens: Annotated[int, Meta(ge=1)] = 512
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None
    """The same seed and conversation give the same answer on the same machine; None is another each time."""


GREEDY = Sampling(temperature=0.0)
"""Always the likeliest token: for comparing."""


class TextChunk(Struct, frozen=True):
    """A piece of what a model says."""

    text: str
    thought: bool = False
    """Whether it is a thought and not the answer."""
    tokens: int = 0
    """Of the thought so far."""


class ThinkingSupport(Struct, frozen=True, kw_only=True):
    """What a model's chat template makes of thinking."""

    kind: Literal["switch", "effort", "always", "none"] = "none"
    """Turned on and off; only lowered; a thought is always opened; the template does not know of it."""
    variable: str = ""
    """What the template calls it: ``enable_thinking``."""
    off: str = ""
    """An effort's least: ``low``."""
    default: Literal["on", "off"] = "off"

    def effect_of(self, thinking: Thinking) -> str:
        """What the setting does here, where that is not what it says; else empty."""
        if thinking == "auto" or self.kind == "switch":
            return ""
        if self.kind == "none":
            return f"Thinking {thinking} changes nothing: this model's chat template has no switch for it."
        if self.kind == "always":
            return f"Thinking {thinking} changes nothing: this model's chat template always opens a thought."
        if thinking == "off":
            return (
                f"Thinking cannot be turned off for this model; the prompt sets {self.variable} = {self.off}."
            )
        return ""


class GenerationResult(Struct, frozen=True, kw_only=True):
    """How an answer came about."""

    ending: FinishReason
    text: str
    """The answer, without thoughts."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, those still known from the turn before: they cost nothing."""
    new_tokens: int
    first_token_s: float
    """From the question to the first token."""
    tokens_per_s: float
    """After the first token; 0 where there was only one."""
    thought: str = ""
    """What it thought before it answered."""
    thought_tokens: int = 0
    thought_s: float = 0.0
    warning: str = ""
    """Where the chat computed other scores than transformers and peft: what that means for the answer."""
    thought_ended: bool = True
    """False where it was still thinking when it stopped."""


class AnswerComparison(Struct, frozen=True):
    """What base and adapter answer to the same prompt."""

    prompt: str
    base: str
    adapter: str


class ChatSource(Struct, frozen=True, kw_only=True):
    """What to load: a base model as the recipe holds it, and adapters to put on it."""

    recipe: Recipe
    adapters: dict[str, str] = {}
    """Voice to the folder of its adapter; each is read when it first speaks."""
    thinking: Thinking = "auto"
    """How it was trained to be asked."""

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Every voice, the base first."""
        return (BASE, *self.adapters)
