"""What is said about a chat: settings, how an answer ended, what there is to talk to. Loads no torch.

Used by the chat itself, by the engine's protocol, and by whoever shows a chat.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from qlora_tui.recipe.schema import Recipe

BASE = "base"
"""The voice of the model without an adapter."""
ADAPTER = "adapter"
"""The voice of a run's final adapter. A checkpoint's is ``step-120``."""

Ending: TypeAlias = Literal["turn end", "most tokens", "context full", "stopped"]
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


class Outcome(Struct, frozen=True, kw_only=True):
    """How an answer came about."""

    ending: Ending
    text: str
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, those still known from the turn before: they cost nothing."""
    new_tokens: int
    first_token_s: float
    """From the question to the first token."""
    tokens_per_s: float
    """After the first token; 0 where there was only one."""


class Compared(Struct, frozen=True):
    """What base and adapter answer to the same prompt."""

    prompt: str
    base: str
    adapter: str


class ChatSource(Struct, frozen=True, kw_only=True):
    """What to load: a base model as the recipe holds it, and adapters to put on it."""

    recipe: Recipe
    adapters: dict[str, str] = {}
    """Voice to the folder of its adapter; each is read when it first speaks."""

    @property
    def voices(self) -> tuple[str, ...]:
        """Every voice, the base first."""
        return (BASE, *self.adapters)
