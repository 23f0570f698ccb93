"""Types of a completion: what a program requests from a model, and what it receives. Loads no torch.

A program may request more than the chat screen does: completion of a text or of token ids instead of a
conversation, stop texts, functions to call, log probabilities, and an answer that satisfies a JSON schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from qlora_tui.chat.chat_types import FinishReason, Sampling
from qlora_tui.data.conversation import Message, ToolCall
from qlora_tui.recipe.schema import Thinking

MAX_ALTERNATIVES = 20
"""Maximum number of alternatives to a token; OpenAI's API has the same limit."""

CompletionEnding: TypeAlias = FinishReason | Literal["stop text", "schema satisfied"]
"""Why a completion ended: as in a chat, at a stop text, or after a complete JSON value or call."""


class Completion(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request for a completion. Exactly one of ``messages``, ``text`` and ``token_ids`` is set."""

    adapter_name: str
    """Name of one of the source's adapters, such as ``base``, ``adapter`` or ``step-120``."""
    messages: tuple[Message, ...] = ()
    """A conversation to answer, rendered with the chat template."""
    text: str | None = None
    """A text to continue. Control tokens in it count as such. If the tokenizer
    starts plain text with a BOS token, a missing one is added.
    """
    token_ids: tuple[int, ...] = ()
    """Token ids to continue, without changes."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the model may call in a conversation, as JSON schemas in OpenAI's format."""
    must_call: tuple[str, ...] = ()
    """Names of the functions of which one must be called. Empty: the model decides."""
    single_call: bool = False
    """Whether at most one call is allowed."""
    thinking: Thinking = "auto"
    template_variables: dict[str, Any] = {}
    """Additional variables for the chat template.

    If they include the template's variable for thinking, this variable overrides ``thinking``.
    """
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it. They do not end a thought."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None
    """Number of most likely tokens to list at each position; 0 lists only the selected token, None
    requests no log probabilities."""
    echo: bool = False
    """Whether to return the prompt before the answer, with its log probabilities if those were requested."""
    answers: bool = True
    """Whether to generate an answer. If false, the prompt is only read, for its echo."""
    schema: dict[str, Any] | None = None
    """JSON schema of the answer, which is one JSON value or a call; ``{}`` allows any value."""


class LikelyToken(Struct, frozen=True):
    """An alternative token at a position."""

    token_id: int
    text: str
    logprob: float


class TokenScore(Struct, frozen=True, omit_defaults=True):
    """A token with its log probability before temperature, penalties and schema are applied."""

    token_id: int
    text: str
    """The token's text in context. For a special token, this is its name; for a part of a character, it is
    ``\\ufffd``.
    """
    logprob: float | None = None
    """Log probability; None for the first token of a prompt, which nothing predicts."""
    top: tuple[LikelyToken, ...] = ()
    """The most likely tokens at this position, in descending order. May lack the token itself."""


class CompletionPart(Struct, frozen=True, omit_defaults=True):
    """A piece of a completion."""

    text: str = ""
    thought: bool = False
    """Whether the text is a thought rather than the answer."""
    tokens: tuple[TokenScore, ...] = ()
    """The tokens since the previous part, if log probabilities were requested.

    Text is held back while it may be the beginning of a stop text. Tokens and text therefore match over the
    whole completion, but not within each part.
    """
    is_prompt: bool = False
    """Whether this part is the echo of the prompt."""


class CompletionResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of a completion, whose text was delivered in parts."""

    ending: CompletionEnding
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that were processed for an earlier request and are reused."""
    new_tokens: int
    """Tokens generated, including the thought and the end of the turn."""
    thought_tokens: int = 0
    first_token_s: float
    """Seconds from the request to the first token."""
    tokens_per_s: float
    """Tokens per second after the first; 0 if there was only one."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls in the answer. Their text is in no :class:`CompletionPart`.

    A call that cannot be parsed stays in the answer's text, unless a call was required. If the answer is cut
    off in a call after complete ones, only the complete calls count, and the rest is dropped.
    """
    stop_text: str = ""
    """The stop text that ended the answer; empty if none did."""
    most_rows: int = 1
    """Largest number of requests that were computed in one pass with this one."""
    warning: str = ""
    """Warning if the logits differed from those of transformers and peft, or could not be compared with them;
    empty otherwise.
    """
    note: str = ""
    """A note on how this session computes; only in the first result after it is known, otherwise empty."""
