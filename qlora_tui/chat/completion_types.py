"""Types of a completion: what a program asks of a model, and what it gets. Loads no torch.

A program may ask for more than the chat screen does: a text or token ids instead of a conversation, texts
that end the answer, functions to call, log probabilities, an answer that satisfies a JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from qlora_tui.chat.chat_types import FinishReason, Sampling
from qlora_tui.data.conversation import Message, ToolCall
from qlora_tui.recipe.schema import Thinking

MAX_ALTERNATIVES = 20
"""Most alternatives to a token; OpenAI's API has the same limit."""

CompletionEnding: TypeAlias = FinishReason | Literal["stop text", "schema satisfied"]
"""Why a completion ended; also by one of its stop texts, or because its JSON value or call was complete."""


class Completion(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is to be completed, and how. Exactly one of ``messages``, ``text`` and ``token_ids`` is set."""

    adapter_name: str
    """One of the source's adapters: ``base``, ``adapter``, ``step-120``."""
    messages: tuple[Message, ...] = ()
    """A conversation to answer, written by the chat template."""
    text: str | None = None
    """A text to continue. Control tokens in it are control tokens; the tokenizer's begin token is added."""
    token_ids: tuple[int, ...] = ()
    """Tokens to continue, as they are."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that may be called, as JSON schemas in OpenAI's wrapping; for a conversation."""
    must_call: tuple[str, ...] = ()
    """Names of the functions of which one must be called; none: the model decides."""
    single_call: bool = False
    """Whether more than one call is too many."""
    thinking: Thinking = "auto"
    template_variables: dict[str, Any] = {}
    """Further variables of the chat template. Its own switch of thinking overrides ``thinking``."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it. They do not end a thought."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """Number of the most likely tokens to list at each position; 0: only the token itself has its log
    probability; None: no log probabilities."""
    echo: bool = False
    """Whether the prompt comes before the answer, with its log probabilities if there are any."""
    answers: bool = True
    """Whether anything is generated; False only reads the prompt, to echo it."""
    schema: dict[str, Any] | None = None
    """JSON schema that the answer, one JSON value, must satisfy unless it is a call; ``{}`` is any value."""


class LikelyToken(Struct, frozen=True):
    """A token that could have been at a position."""

    token_id: int
    text: str
    logprob: float


class TokenScore(Struct, frozen=True, omit_defaults=True):
    """A token with its log probability before temperature, penalties and schema."""

    token_id: int
    text: str
    """Its text in context; the name of a special token. A part of a character is ``\\ufffd``."""
    logprob: float | None = None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[LikelyToken, ...] = ()
    """The most likely tokens at its position, the likeliest first; may lack the token itself."""


class CompletionPart(Struct, frozen=True, omit_defaults=True):
    """A piece of a completion."""

    text: str = ""
    thought: bool = False
    """Whether the text is a thought rather than the answer."""
    tokens: tuple[TokenScore, ...] = ()
    """The tokens since the last part, if log probabilities were asked for. A text may be held back while it
    can be the beginning of a stop text, so tokens and text match as a whole, not in each part."""
    is_prompt: bool = False
    """Whether this is the echoed prompt."""


class CompletionResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of a completion, whose text came in parts."""

    ending: CompletionEnding
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that had been processed for an earlier request."""
    new_tokens: int
    """Tokens generated, with the end of the turn and those of the thought."""
    thought_tokens: int = 0
    first_token_s: float
    """Seconds from the request to the first token."""
    tokens_per_s: float
    """Tokens per second after the first; 0 if there was only one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Functions called, whose text came in no part. A call that cannot be read stays text of the
    answer, unless it had to be made, or it was cut after others."""
    stop_text: str = ""
    """The stop text that ended the answer."""
    most_rows: int = 1
    """Most requests that were answered in one pass with this one."""
    warning: str = ""
    """Warning if the logits differed from those of transformers and peft; empty otherwise."""
    note: str = ""
    """How this session computes, in the first result that knows; empty if there is nothing to say."""
