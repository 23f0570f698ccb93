"""Answers of the engine as OpenAI's objects, complete or as the events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from qlora_tui.chat.chat_types import Decided
from qlora_tui.chat.completion_types import CompletionPart, CompletionResult, TokenScore
from qlora_tui.data.conversation import ToolCall
from qlora_tui.serving.requests import Body, ChatBody, DecideBody

DONE = b"data: [DONE]\n\n"
_REASONS = {"most tokens": "length", "context full": "length"}

Json = dict[str, Any]


def event(value: Json) -> bytes:
    """Return a server-sent event with a JSON value."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Choice:
    """One answer, collected while it is generated."""

    def __init__(self, index: int, body: Body) -> None:
        self.index = index
        self._body = body
        self._parts: list[CompletionPart] = []
        self._text_length = 0
        self.result: CompletionResult | None = None

    def take(self, reply: CompletionPart | CompletionResult) -> Iterator[Json]:
        """Add a part of the answer or its result; yield the objects to stream, if it is streamed."""
        begins = not self._parts
        if isinstance(reply, CompletionPart):
            self._parts.append(reply)
        else:
            self.result = reply
        if not self._body.stream:
            return
        is_chat = isinstance(self._body, ChatBody)
        if is_chat and begins:
            yield self._streamed({"delta": {"role": "assistant", "content": ""}, "logprobs": None})
        if isinstance(reply, CompletionResult):
            last: Json = {"text": ""}
            if is_chat:
                # Calls are sent in one piece.
                last = {"delta": {"tool_calls": _calls(reply.tool_calls)} if reply.tool_calls else {}}
            yield self._streamed({**last, "logprobs": None}, self._finish_reason)
        elif is_chat:
            delta = {"reasoning_content" if reply.thought else "content": reply.text}
            yield self._streamed({"delta": delta, "logprobs": self._chat_logprobs([reply])})
        else:
            yield self._streamed({"text": reply.text, "logprobs": self._logprobs([reply])})

    def whole(self) -> Json:
        """Return the complete choice, for an answer that is not streamed."""
        assert self.result is not None
        text = "".join(part.text for part in self._parts if not part.thought)
        if isinstance(self._body, ChatBody):
            calls = self.result.tool_calls
            message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if thought := "".join(part.text for part in self._parts if part.thought):
                message["reasoning_content"] = thought
            if calls:
                message["tool_calls"] = _calls(calls)
            shown: Json = {"message": message, "logprobs": self._chat_logprobs(self._parts)}
        else:
            shown = {"text": text, "logprobs": self._logprobs(self._parts)}
        return {"index": self.index, **shown, "finish_reason": self._finish_reason}

    @property
    def _finish_reason(self) -> str:
        assert self.result is not None
        return _REASONS.get(self.result.ending, "tool_calls" if self.result.tool_calls else "stop")

    def _streamed(self, shown: Json, finish_reason: str | None = None) -> Json:
        return {"index": self.index, **shown, "finish_reason": finish_reason}

    def _chat_logprobs(self, parts: Sequence[CompletionPart]) -> Json | None:
        if self._body.asked_logprobs is None:
            return None
        tokens = [token for part in parts if not part.thought for token in part.tokens]
        return {
            "content": [
                {
                    **_scored(token.text, token.logprob),
                    "top_logprobs": [_scored(other.text, other.logprob) for other in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _logprobs(self, parts: Sequence[CompletionPart]) -> Json | None:
        if self._body.asked_logprobs is None:
            return None
        tokens = [token for part in parts for token in part.tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._text_length)
            self._text_length += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens],
            "text_offset": offsets,
        }


def chunk(body: Body, answer_id: str, choices: list[Json], usage: Json | None = None) -> Json:
    """Return one object of a stream, with these choices."""
    value = _head(body, answer_id, ".chunk") | {"choices": choices}
    return value | {"usage": usage} if includes_usage(body) else value


def includes_usage(body: Body) -> bool:
    """Return whether the stream ends with the token usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def whole(body: Body, choices: Sequence[Choice]) -> Json:
    """Return the complete response, for an answer that is not streamed."""
    shown = {"choices": [choice.whole() for choice in choices], "usage": usage(body, choices)}
    return _head(body, new_id(body)) | shown


def usage(body: Body, choices: Sequence[Choice]) -> Json:
    """Return the token counts of prompts and answers. A prompt with several answers counts once."""
    results = [choice.result for choice in choices if choice.result is not None]
    first = results[:: body.n or 1]
    read, new = sum(result.prompt_tokens for result in first), sum(result.new_tokens for result in results)
    return {
        "prompt_tokens": read,
        "completion_tokens": new,
        "total_tokens": read + new,
        "prompt_tokens_details": {"cached_tokens": sum(result.reused_tokens for result in first)},
        "completion_tokens_details": {"reasoning_tokens": sum(result.thought_tokens for result in results)},
    }


def model(name: str) -> Json:
    """Return the API object that describes a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "qlora-tui"}


def decision(body: DecideBody, decided: Decided) -> Json:
    """Return the API object of a decision, with the most probable label first."""
    return {
        "object": "decision",
        "model": body.model,
        "label": decided.best.option,
        "probability": decided.best.probability,
        "abstain": decided.best.probability < body.threshold,
        "calibrated": decided.is_calibrated,
        "probabilities": {each.option: each.probability for each in decided.options},
        "fields": {
            field: {each.option: each.probability for each in values}
            for field, values in decided.fields.items()
        },
    }


def new_id(body: Body) -> str:
    """Return a new id for an answer."""
    return ("chatcmpl-" if isinstance(body, ChatBody) else "cmpl-") + secrets.token_hex(12)


def _head(body: Body, answer_id: str, suffix: str = "") -> Json:
    is_chat = isinstance(body, ChatBody)
    return {
        "id": answer_id,
        "object": f"chat.completion{suffix}" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": body.model,
    }


def _calls(calls: Sequence[ToolCall]) -> list[Json]:
    return [
        {
            "index": index,
            "id": call.id or f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments
                if isinstance(call.arguments, str)
                else msgspec.json.encode(call.arguments).decode(),
            },
        }
        for index, call in enumerate(calls)
    ]


def _scored(text: str, logprob: float | None) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _top(token: TokenScore) -> dict[str, float] | None:
    """Return the log probabilities of a token and its alternatives; None for a token without a score."""
    if token.logprob is None:
        return None
    scores = {token.text: token.logprob}
    for other in token.top:
        scores.setdefault(other.text, other.logprob)
    return scores
