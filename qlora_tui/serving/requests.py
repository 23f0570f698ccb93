"""Request bodies: validated and converted to completions for the engine.

Names and meanings follow OpenAI's API reference for ``/v1/completions`` and ``/v1/chat/completions``, plus
parameters that vLLM and other servers add: ``top_k``, ``repetition_penalty``, ``chat_template_kwargs``,
``reasoning_content``. Unknown parameters are ignored, as by those servers, because clients send parameters of
their own. A known parameter that would change the answer but is not supported is rejected by name.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from qlora_tui.chat.chat_types import Sampling
from qlora_tui.chat.completion_types import MAX_ALTERNATIVES, Completion
from qlora_tui.data.conversation import Message, Role, ToolCall
from qlora_tui.decoding import decode_json, try_json
from qlora_tui.serving.errors import ApiError, unsupported
from qlora_tui.serving.model_names import ServedModel

MOST_CHOICES = 128
"""Maximum number of answers to one request: prompts times ``n``."""
_COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` in ``/v1/completions``, as in OpenAI's API."""
_SEEDS = 1 << 32
_MOST_STOPS = 16
_NOT_FOLLOWED: dict[str, Any] = {
    "bad_words": [],
    "best_of": 1,
    "frequency_penalty": 0,
    "functions": [],
    "grammar": "",
    "guided_choice": [],
    "guided_grammar": "",
    "guided_json": {},
    "guided_regex": "",
    "ignore_eos": False,
    "json_schema": {},
    "logit_bias": {},
    "min_p": 0,
    "min_tokens": 0,
    "modalities": ["text"],
    "presence_penalty": 0,
    "stop_token_ids": [],
    "structured_outputs": {},
    "suffix": "",
}
"""Unsupported parameters that would change the answer, each with the value that has no effect.

Any other value is rejected. The parameters that are not part of OpenAI's API come from vLLM and llama.cpp.
"""
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of a chat template that are set from the conversation."""

BodyT = TypeVar("BodyT", bound=Struct)
Tokens: TypeAlias = list[int]
JsonObject: TypeAlias = dict[str, Any]


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class _CommonBody(Struct, frozen=True, kw_only=True):
    """Parameters that both kinds of completion have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Meta(max_length=_MOST_STOPS)] | None = None

    def sampling(self, choice: int, default_tokens: int) -> Sampling:
        """Return the sampling settings of a choice; each choice has its own seed. Raises ApiError."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            # vLLM uses -1 for all tokens.
            "top_k": max(self.top_k, 0) if self.top_k is not None else None,
            "repetition_penalty": self.repetition_penalty,
            "seed": (self.seed + choice) % _SEEDS if self.seed is not None else None,
            "max_new_tokens": max(1, default_tokens if self.max_tokens is None else self.max_tokens),
        }
        try:
            return msgspec.convert({k: v for k, v in given.items() if v is not None}, Sampling)
        except msgspec.ValidationError as error:
            raise invalid(error) from error

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


class ContentPart(Struct, frozen=True):
    type: str
    text: str = ""


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str = ""


class SentToolCall(Struct, frozen=True):
    function: FunctionCall
    id: str = ""


class SentMessage(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[SentToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class JsonSchema(Struct, frozen=True):
    schema: JsonObject | None = None


class ResponseFormat(Struct, frozen=True):
    type: str
    json_schema: JsonSchema | None = None


class NamedFunction(Struct, frozen=True):
    name: str


class NamedChoice(Struct, frozen=True, tag_field="type", tag="function"):
    function: NamedFunction


class Function(Struct, frozen=True):
    name: str
    parameters: JsonObject | None = None


class Tool(Struct, frozen=True):
    function: Function


class ChatBody(_CommonBody, frozen=True, kw_only=True):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[SentMessage], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None
    tools: list[JsonObject] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: JsonObject | None = None
    reasoning_effort: str | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """Number of alternatives to each token; None if no log probabilities are requested."""
        return self.top_logprobs or 0 if self.logprobs else None

    def completions(self, model: ServedModel, context_tokens: int) -> list[Completion]:
        """Return one completion for each choice. Raises ApiError."""
        if self.max_completion_tokens is not None:
            self = msgspec.structs.replace(self, max_tokens=self.max_completion_tokens)
        variables = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        if taken := _TEMPLATE_ARGUMENTS.intersection(self.chat_template_kwargs or {}):
            what = f"chat_template_kwargs cannot set {min(taken)}, which the server sets itself."
            raise ApiError(400, what, param="chat_template_kwargs", code="invalid_value")
        tools, must_call = self._tools()
        messages = tuple(_message(i, sent) for i, sent in enumerate(self.messages))
        return [
            Completion(
                adapter_name=model.adapter_name,
                messages=messages,
                tools=tools,
                must_call=must_call,
                # As in OpenAI's API, a function that the client chose is called once.
                single_call=self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedChoice),
                template_variables=variables | (self.chat_template_kwargs or {}),
                thinking="off" if self.reasoning_effort == "none" else model.thinking,
                sampling=self.sampling(choice, context_tokens),
                stop=self.stops,
                logprobs=self.asked_logprobs,
                schema=_schema(self.response_format),
            )
            for choice in range(self.n or 1)
        ]

    def _tools(self) -> tuple[tuple[JsonObject, ...], tuple[str, ...]]:
        """Return the available functions, and the names of those functions of which one must be called.

        The names are empty if no call is required. Raises ApiError.
        """
        tools, choice = tuple(self.tools or ()), self.tool_choice
        try:
            names = [tool.function.name for tool in msgspec.convert(tools, list[Tool])]
        except msgspec.ValidationError as error:
            raise ApiError(400, f"Invalid 'tools': {error}.", param="tools", code="invalid_value") from error
        if choice in (None, "auto", "none"):
            return () if choice == "none" else tools, ()
        wanted = [choice.function.name] if isinstance(choice, NamedChoice) else names
        if not wanted or not set(wanted) <= set(names):
            what = f"has no function '{wanted[0]}'" if wanted else "is empty"
            what = f"tool_choice asks for a call, and tools {what}."
            raise ApiError(400, what, param="tool_choice", code="invalid_value")
        return tools, tuple(wanted)


class CompletionBody(_CommonBody, frozen=True, kw_only=True):
    """The body of ``/v1/completions``."""

    prompt: str | list[Any]
    """A text, a list of token ids, or a list of either."""
    echo: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] | None = None

    @property
    def asked_logprobs(self) -> int | None:
        """Number of alternatives to each token; None if no log probabilities are requested."""
        return self.logprobs

    def prompts(self) -> list[str] | list[Tokens]:
        """Return each prompt, as text or as token ids. Raises ApiError."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if given and all(isinstance(each, int) for each in given):
            given = [given]
        if not given or not all(given):
            raise ApiError(400, "prompt is empty: there is nothing to continue.", param="prompt")
        for kind in (list[str], list[Tokens]):
            with suppress(msgspec.ValidationError):
                return msgspec.convert(given, kind)  # type: ignore[return-value]  # one of the kinds
        raise ApiError(
            400, "prompt must be a string, a list of token ids, or a list of either.", param="prompt"
        )

    def completions(self, model: ServedModel, context_tokens: int) -> list[Completion]:
        """Return one completion for each choice. Raises ApiError."""
        prompts, n = self.prompts(), self.n or 1
        if _schema(self.response_format) is not None:
            what = "response_format is supported by /v1/chat/completions only."
            raise unsupported("response_format", what)
        if len(prompts) * n > MOST_CHOICES:
            raise ApiError(
                400,
                f"{len(prompts) * n} answers were requested; the limit is {MOST_CHOICES}.",
                param="prompt",
            )
        return [
            Completion(
                adapter_name=model.adapter_name,
                text=prompt if isinstance(prompt, str) else None,
                token_ids=() if isinstance(prompt, str) else tuple(prompt),
                sampling=self.sampling(choice, _COMPLETION_TOKENS),
                stop=self.stops,
                logprobs=self.logprobs,
                echo=bool(self.echo),
                answers=self.max_tokens != 0,
            )
            for prompt in prompts
            for choice in range(n)
        ]


Body: TypeAlias = ChatBody | CompletionBody
"""A request for completions."""


class DecideBody(Struct, frozen=True, kw_only=True):
    """The body of ``/v1/decide``: a conversation, or one text to decide on."""

    model: str
    messages: Annotated[list[SentMessage], Meta(min_length=1)] | None = None
    input: str | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """If the best option is less probable than this, the reply says to leave the decision to a person
    (``abstain``).
    """

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Return the conversation. Raises ApiError."""
        if (self.messages is None) == (self.input is None):
            raise ApiError(400, "Send either 'messages' or 'input'.", param="messages")
        if self.input is not None:
            if not self.input.strip():
                raise ApiError(400, "'input' is empty: there is nothing to decide.", param="input")
            return (Message("user", self.input),)
        return tuple(_message(index, message) for index, message in enumerate(self.messages or ()))


def decode_body(body: bytes, kind: type[BodyT]) -> BodyT:
    """Decode a request's body. Raises ApiError."""
    try:
        given = decode_json(body, _OBJECT)
        for param, neutral in _NOT_FOLLOWED.items():
            if given.get(param) not in (None, neutral):
                raise unsupported(param, f"{param} is not supported by this server; leave it out.")
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except msgspec.DecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from error


def invalid(error: msgspec.ValidationError) -> ApiError:
    """Return the error for a value of a wrong type or out of range, with its location in the body."""
    what, _, place = str(error).partition(" - at `$.")
    param = place.removesuffix("`")
    if not place and "missing required field" in what:
        param = what.rpartition("field ")[2].strip("`")
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_parameter")
    where = f"Invalid '{param}': " if param else ""
    return ApiError(400, f"{where}{what}.", param=param, code="invalid_value")


def _message(index: int, sent: SentMessage) -> Message:
    roles: dict[str, Role] = {"developer": "system", "function": "tool"}
    calls = tuple(
        ToolCall(call.function.name, _arguments(call.function.arguments), call.id)
        for call in sent.tool_calls or ()
    )
    return Message(
        roles.get(sent.role, sent.role),  # type: ignore[arg-type]  # the others are the same in both
        _text(index, sent.content),
        reasoning=sent.reasoning_content or sent.reasoning or "",
        tool_calls=calls,
        tool_call_id=sent.tool_call_id or "",
        name=sent.name or "",
    )


def _text(index: int, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type not in ("text", "input_text"):
            raise unsupported(
                f"messages[{index}].content[{number}]",
                f"A part of type {part.type!r} is not supported: this server's models read text only.",
            )
    return "".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """Return the parsed arguments of a call, or the text itself if it is not JSON."""
    value = try_json(text.encode(), _JSON)
    return text if value is None else value


def _schema(response_format: ResponseFormat | None) -> JsonObject | None:
    """Return the JSON schema that the answer must satisfy; None for free text. Raises ApiError."""
    match response_format:
        case None | ResponseFormat(type="text"):
            return None
        case ResponseFormat(type="json_object"):
            return {"type": "object"}
        case ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=schema)) if schema is not None:
            return schema
    raise ApiError(
        400,
        "response_format must have type text, json_object, or json_schema with a schema.",
        param="response_format",
    )


_JSON = msgspec.json.Decoder(Any)
_OBJECT = msgspec.json.Decoder(JsonObject)
