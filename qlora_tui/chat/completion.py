"""One completion for a program, token by token: its text, stop texts and log probabilities.

Tokens are selected and decoded as in the chat (:mod:`qlora_tui.chat.generation`). After each token, a
completion lets the others continue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_tui.chat.completion_types import (
    Completion,
    CompletionEnding,
    CompletionPart,
    CompletionResult,
    LikelyToken,
    TokenScore,
)
from qlora_tui.chat.constraints import Calls, Constraint
from qlora_tui.chat.generation import IncrementalDetokenizer, TokenSampler
from qlora_tui.data.render import text_at
from qlora_tui.data.thought_splitter import TextChunk, ThoughtSplitter, begun_length
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.data.tokenizer_files import panics_as_errors
from qlora_tui.data.tool_calls import CallFormat, CallText, argument_schemas
from qlora_tui.errors import EXIT_USAGE, UserError

if TYPE_CHECKING:
    from qlora_tui.chat.batches import Row
    from qlora_tui.chat.session import ChatSession

_SCORED_TOKENS = 128
"""Number of prompt tokens per pass if every token is scored. Scoring needs the logits of all tokens in
memory, twice.
"""


def completion_prompt(session: ChatSession, completion: Completion) -> list[int]:
    """Return the token ids of the prompt to complete. Raises UserError."""
    if completion.messages:
        return session.prompt(
            completion.messages, completion.thinking, completion.tools, completion.template_variables
        )
    prompt = list(completion.token_ids)
    if completion.text is not None:
        tokenizer = session.tokenizer
        with panics_as_errors():
            prompt = session.tokenize(completion.text, tokenizer.encode)
        begin = tokenizer.bos_id
        if begin is not None and tokenizer.begins_with_bos and prompt[:1] != [begin]:
            prompt.insert(0, begin)
    if not prompt or not all(0 <= token_id < session.vocabulary for token_id in prompt):
        raise UserError(
            "The prompt cannot be read",
            what="The prompt contains no tokens."
            if not prompt
            else f"The prompt contains a token id outside the range 0 to {session.vocabulary - 1:,}.",
            fix="Send text, or token ids of this model's tokenizer.",
            exit_code=EXIT_USAGE,
        )
    session.check_length(len(prompt) + completion.answers)
    return prompt


def completion_constraint(session: ChatSession, completion: Completion) -> Constraint | None:
    """Return the constraint of an answer; None if there is none. Raises UserError."""
    schemas, names, schema = argument_schemas(completion.tools), completion.must_call, completion.schema
    if names:
        schema = None
    elif schema is not None:
        # Besides a value that satisfies the schema, the answer may be a call.
        names = tuple(schemas)
    else:
        return None
    written, calls = session.call_format, None
    if names and written is not None and written.shape is not None:
        functions = {name: schemas[name] for name in names}
        calls = Calls(written.shape, functions, completion.single_call)
    elif completion.must_call:
        raise UserError(
            "tool_choice cannot be followed",
            what="The chat template of this model writes tool calls in an unknown format.",
            fix="Use auto or none.",
            exit_code=EXIT_USAGE,
        )
    return session.constraint(schema, calls, thinks=completion.thinking != "off")


def score_tokens(
    tokenizer: ChatTokenizer, logits: Tensor, token_ids: Sequence[int], start: int, alternatives: int
) -> list[TokenScore]:
    """Return the scores of the tokens that ``logits`` (tokens, vocabulary) predict.

    The first of these tokens is ``token_ids[start]``. ``token_ids`` may hold more tokens before and after
    them.
    """
    logprobs = logits.float().log_softmax(-1)
    scored = token_ids[start : start + len(logprobs)]
    own = logprobs.gather(-1, torch.tensor(scored, device=logprobs.device)[:, None])[:, 0]
    best = logprobs.topk(alternatives, dim=-1)
    # Each read waits for the GPU, so all tokens are read at once.
    rows = zip(scored, own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    scores = []
    for place, (token_id, logprob, likely_ids, likely_logprobs) in enumerate(rows, start):
        before = token_ids[max(0, place - 4) : place]
        top = tuple(
            LikelyToken(likely, _text_after(tokenizer, before, likely), value)
            for likely, value in zip(likely_ids, likely_logprobs, strict=True)
        )
        scores.append(TokenScore(token_id, _text_after(tokenizer, before, token_id), logprob, top))
    return scores


def _text_after(tokenizer: ChatTokenizer, before: Sequence[int], token_id: int) -> str:
    return text_at(tokenizer, [*before, token_id], len(before), len(before) + 1)


class StopTexts:
    """Cuts a text, which arrives in pieces, before the first stop text in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self.pending = ""
        """Text that is held back because it may be the beginning of a stop text.

        After a match, this is the text that begins with the stop text.
        """
        self.matched = ""

    def feed(self, text: str) -> str:
        """Add a piece of text, and return the text that certainly precedes any stop text."""
        if self.matched:
            return ""
        self.pending += text
        places = [(place, stop) for stop in self._stops if (place := self.pending.find(stop)) >= 0]
        if places:
            place, self.matched = min(places)
        else:
            place = len(self.pending) - begun_length(self.pending, self._stops)
        ready, self.pending = self.pending[:place], self.pending[place:]
        return ready

    def rest(self) -> str:
        """Return the text that is still held back. Call this when no more text follows."""
        return "" if self.matched else self.pending


@dataclass
class _PendingScore:
    """The score of a token, while it is not yet part of a yielded piece."""

    score: TokenScore
    begin: int
    end: int
    """Number of characters of the text up to and including the token."""


class CompletionText:
    """The text of a completion, cut into parts, with thoughts separated and stop texts recognized."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        splitter: ThoughtSplitter,
        stops: Sequence[str],
        calls: CallText | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._splitter = splitter
        self._stops = StopTexts(stops)
        self._calls = calls
        self._characters = 0
        """Number of characters decoded so far, including text held back and thought marks."""
        self._scores: deque[_PendingScore] = deque()
        self.thought_tokens = 0

    @property
    def is_outside(self) -> bool:
        """Return whether the text so far ends inside a thought, or in an incomplete thought mark."""
        return self._splitter.in_thought or self._splitter.pending_length > 0

    @property
    def stop_text(self) -> str:
        """Return the stop text that was found; empty if none was."""
        return self._stops.matched

    def add(
        self, token_id: int, score: TokenScore | None = None, *, ends: bool = False
    ) -> list[CompletionPart]:
        """Add a token, and return the parts that it completes.

        With ``ends``, the token ends the turn and adds no text.
        """
        text = "" if ends else self._detokenizer.add(token_id)
        begin = self._characters
        self._characters += len(text)
        if score is not None:
            self._scores.append(_PendingScore(score, begin, self._characters))
        parts = self._parts(self._splitter.feed(text))
        self.thought_tokens += self._splitter.in_thought
        return parts

    def rest(self, *, is_cut: bool = False) -> list[CompletionPart]:
        """Return the parts that are still held back.

        With ``is_cut``, the answer was cut off, so its last tool call may be incomplete.
        """
        text = "" if self.stop_text else self._detokenizer.rest()
        self._characters += len(text)
        parts = self._parts([*self._splitter.feed(text), *self._splitter.rest()])
        text = self._stops.rest()
        if self._calls is not None:
            text = self._calls.feed(text) + self._calls.rest(is_cut=is_cut)
        if text:
            parts.append(CompletionPart(text))
        if self.stop_text:
            cut = self._characters - len(self._stops.pending)
            while self._scores and self._scores[-1].begin >= cut:
                self._scores.pop()
        if self._scores:
            parts = parts or [CompletionPart()]
            parts[-1] = self._with_scores(parts[-1], self._characters)
        return parts

    def _parts(self, chunks: Sequence[TextChunk]) -> list[CompletionPart]:
        parts = []
        for chunk in chunks:
            if text := chunk.text if chunk.thought else self._answer(chunk.text):
                parts.append(CompletionPart(text, chunk.thought))
        if parts and self._scores and not self.stop_text:
            held_back = len(self._stops.pending) + self._splitter.pending_length
            held_back += len(self._calls.pending) if self._calls is not None else 0
            parts[-1] = self._with_scores(parts[-1], self._characters - held_back)
        return parts

    def _answer(self, text: str) -> str:
        """Add text of the answer; return the text that cannot become part of a stop text or a tool call."""
        text = self._stops.feed(text)
        return text if self._calls is None else self._calls.feed(text)

    def _with_scores(self, part: CompletionPart, until: int) -> CompletionPart:
        """Return the part with the scores of all tokens that end before the character ``until``."""
        tokens = []
        while self._scores and self._scores[0].end <= until:
            tokens.append(self._scores.popleft().score)
        return CompletionPart(part.text, part.thought, tuple(tokens))


class CompletionStream:
    """A completion in progress: iterate over :meth:`run`."""

    def __init__(
        self,
        session: ChatSession,
        completion: Completion,
        prompt: list[int],
        constraint: Constraint | None,
        call_format: CallFormat | None,
        stop: Event,
    ) -> None:
        self._session = session
        self._completion = completion
        self._prompt = prompt
        self._constraint = constraint
        self._call_format = call_format
        self._stop = stop

    def run(self) -> Generator[CompletionPart | None, None, CompletionResult]:
        """Yield the parts, or None after a step that completes no part; return the result."""
        row, reused = self._session.batches.row(
            self._completion.adapter_name, self._prompt, anew=self._scores_prompt
        )
        try:
            return (yield from self._complete(row, reused))
        finally:
            row.leave()

    def _complete(self, row: Row, reused: int) -> Generator[CompletionPart | None, None, CompletionResult]:
        completion, session = self._completion, self._session
        began = time.perf_counter()
        logits = yield from self._read_prompt(row, reused)
        row.join()
        decode, calls = session.decode, None
        if self._call_format is not None:
            decode = session.decoder_of(self._call_format).decode
            calls = CallText(self._call_format, completion.tools, must_call=bool(completion.must_call))
        splitter = session.splitter(self._prompt)
        text = CompletionText(IncrementalDetokenizer(decode), splitter, completion.stop, calls)
        sampler = TokenSampler(completion.sampling, self._prompt, session.device)
        constraint = self._constraint
        answer: list[int] = []
        ending: CompletionEnding = "stopped" if completion.answers else "most tokens"
        first_at = began
        limit = self._max_new_tokens
        while logits is not None and len(answer) < limit:
            is_constrained = constraint is not None and constraint.applies(is_outside=text.is_outside)
            token = sampler.next(constraint.mask(logits) if constraint and is_constrained else logits)
            # Score the token before it is fed, because a recorded step overwrites the logits.
            score = self._score(logits, answer, token)
            token_id = row.feed(token) if len(answer) + 1 < limit else int(token)
            if not answer:
                first_at = time.perf_counter()
            answer.append(token_id)
            if constraint and is_constrained:
                constraint.add(token_id)
            is_end = token_id in session.end_ids
            parts: Sequence[CompletionPart | None] = text.add(token_id, score, ends=is_end)
            yield from parts or (None,)
            if is_end or text.stop_text:
                ending = "turn end" if is_end else "stop text"
                break
            if constraint and constraint.is_satisfied:
                ending = "schema satisfied"
                break
            if self._stop.is_set():
                break
            if len(answer) < limit:
                logits = row.next_logits()
        else:
            if logits is not None and completion.answers:
                ending = "context full" if limit < completion.sampling.max_new_tokens else "most tokens"
        yield from text.rest(is_cut=ending in ("most tokens", "context full"))
        ended = time.perf_counter()
        return CompletionResult(
            ending=ending,
            prompt_tokens=len(self._prompt),
            reused_tokens=reused,
            new_tokens=len(answer),
            thought_tokens=text.thought_tokens,
            first_token_s=first_at - began,
            tokens_per_s=(len(answer) - 1) / (ended - first_at) if len(answer) > 1 else 0.0,
            tool_calls=calls.calls[: 1 if completion.single_call else None] if calls is not None else (),
            stop_text=text.stop_text,
            most_rows=row.most_rows,
            warning=session.warning,
            note=" ".join(filter(None, (session.take_note(), session.batches.take_note()))),
        )

    @property
    def _scores_prompt(self) -> bool:
        return self._completion.echo and self._completion.logprobs is not None

    @property
    def _max_new_tokens(self) -> int:
        if not self._completion.answers:
            return 0
        return min(self._completion.sampling.max_new_tokens, self._session.context_length - len(self._prompt))

    def _read_prompt(self, row: Row, reused: int) -> Generator[CompletionPart | None, None, Tensor | None]:
        """Process the prompt after its first ``reused`` tokens, and yield it if it is to be echoed.

        Returns the logits (1, vocabulary) after the prompt; None after a stop request, or if only the text of
        the prompt was requested.
        """
        completion, session, prompt = self._completion, self._session, self._prompt
        if completion.echo:
            text = completion.text if completion.text is not None else session.tokenizer.decode(prompt)
            yield CompletionPart(text, is_prompt=True)
            if not self._scores_prompt and not completion.answers:
                return None
        chunk, scores = session.prefill_tokens, self._scores_prompt
        if scores:
            chunk = min(chunk, _SCORED_TOKENS) if session.reads_in_parts else chunk
            first = text_at(session.tokenizer, prompt, 0, 1)
            yield CompletionPart(tokens=(TokenScore(prompt[0], first),), is_prompt=True)
        logits = None
        for start in range(reused, len(prompt), chunk):
            ids = prompt[start : start + chunk]
            while not (is_stopped := self._stop.is_set()) and not session.batches.may_read(len(ids)):
                yield None
            if is_stopped:
                return None
            logits = session.next_logits(completion.adapter_name, ids, row.prefix_cache, every=scores)
            if scores:
                # The last row predicts the first token of the answer.
                known = logits[: len(prompt) - start - 1]
                if len(known):
                    tokens = score_tokens(
                        session.tokenizer, known, prompt, start + 1, completion.logprobs or 0
                    )
                    yield CompletionPart(tokens=tuple(tokens), is_prompt=True)
                logits = logits[-1:]
            yield None
        return logits

    def _score(self, logits: Tensor, answer: list[int], token: Tensor) -> TokenScore | None:
        """Return the score of a token (1, 1) that follows ``answer``; None if scores were not requested."""
        if self._completion.logprobs is None:
            return None
        ids = [*self._prompt[-4:], *answer[-4:], int(token)]
        (score,) = score_tokens(self._session.tokenizer, logits, ids, len(ids) - 1, self._completion.logprobs)
        return score
