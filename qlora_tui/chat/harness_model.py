"""A chat session as a model of lm-eval: likelihoods and greedy answers of the base, or of one adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from qlora_tui.chat.session import ChatSession

_BATCH_ROWS = 16
_DEFAULT_NEW_TOKENS = 256
_HEAD_ROWS = 256
"""Vocabulary-wide rows computed at a time."""


class SessionModel(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """Answers lm-eval's requests with a session, as its ``HFLM`` does with a model of transformers."""

    def __init__(self, session: ChatSession, adapter_name: str, progress: Callable[[], None]) -> None:
        """``progress`` is called after each request."""
        super().__init__()
        self._session = session
        self._adapter_name = adapter_name
        self._progress = progress
        backend = session.tokenizer.backend
        self._starts = backend.encode("", add_special_tokens=True).ids

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches prompts, which it does not here."""
        return str(self._session.source.recipe.model.id)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a turn."""
        tokenizer = self._session.tokenizer
        return int(next(iter(tokenizer.turn_end_ids), tokenizer.pad_id or 0))

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self._session.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with what the tokenizer itself puts before every text."""
        ids = self._session.tokenizer.encode(string)
        if add_special_tokens is False or ids[: len(self._starts)] == self._starts:
            return ids
        return [*self._starts, *ids]

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation as the model was trained to read it."""
        template = self._session.tokenizer.template
        return template.render([dict(turn) for turn in chat_history], prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self._session.context_length :]
            results.append(self._likelihood(ids, min(len(continuation), len(ids) - 1)))
            self._progress()
        return results

    def _likelihood(self, ids: list[int], count: int) -> tuple[float, bool]:
        """Log-likelihood of the last ``count`` tokens, and whether each is the most likely one."""
        session = self._session
        places = list(range(len(ids) - 1 - count, len(ids) - 1))
        targets = torch.tensor(ids[len(ids) - count :], device=session.device)
        total, is_greedy = 0.0, True
        with torch.inference_mode():
            inputs, _ = session.head_inputs(self._adapter_name, ids, places)
            parts = zip(torch.split(inputs, _HEAD_ROWS), torch.split(targets, _HEAD_ROWS), strict=True)
            for part, wanted in parts:
                log_probabilities = session.head.logits(part).float().log_softmax(-1)
                total += float(log_probabilities.gather(-1, wanted[:, None]).sum())
                is_greedy &= bool((log_probabilities.argmax(-1) == wanted).all())
        return total, is_greedy

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not computed: tasks that need it are refused when they are read."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of the texts that end it."""
        answers = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(_new_tokens(request.args[1]), []).append(number)
        for limit, numbers in by_length.items():
            context = max(1, self._session.context_length - limit)
            ids = {number: self.tok_encode(requests[number].args[0])[-context:] for number in numbers}
            order = sorted(numbers, key=lambda number: -len(ids[number]))
            for start in range(0, len(order), _BATCH_ROWS):
                batch = order[start : start + _BATCH_ROWS]
                batch_answers = self._session.greedy_batch(self._adapter_name, [ids[n] for n in batch], limit)
                for number, answer in zip(batch, batch_answers, strict=True):
                    until = requests[number].args[1].get("until") or []
                    answers[number] = cut_at(self._session.decode(answer), until)
                    self._progress()
        return answers


def cut_at(text: str, until: str | Sequence[str]) -> str:
    """The text up to the first of the texts that end it."""
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.split(end)[0]
    return text


def _new_tokens(settings: dict[str, Any]) -> int:
    from qlora_tui.runs.harness.harness_keys import MAX_NEW_TOKENS_KEYS

    return next((int(settings[key]) for key in MAX_NEW_TOKENS_KEYS if settings.get(key)), _DEFAULT_NEW_TOKENS)
