"""Compares a session's logits with the libraries' logits, and turns off features that make them differ.

A session reads a prompt in parts, keeps keys and values, decodes in fixed shapes on a GPU, and has its own
code for adapters and attention. Not every model supports all of this. On the first prompt of each adapter,
:mod:`qlora_tui.chat.logits` compares the logits, and the session turns off features that the model does not
support.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qlora_tui.chat.logits import TOKENS, LogitsComparison, compare_logits

if TYPE_CHECKING:
    from qlora_tui.chat.session import ChatSession


class SessionCheck:
    """Compares the logits of each adapter with the libraries' logits, once per adapter."""

    def __init__(self, session: ChatSession, model: Any) -> None:
        self._session = session
        self._model = model
        self._not_checkable: set[str] = set()
        """Adapters whose logits could not be compared."""

    def run(self, adapter_name: str, prompt: list[int]) -> None:
        """Compare a loaded adapter's logits with those of transformers and peft, unless this was done before.

        Only the end of the prompt is used. Its last two tokens are read one at a time, and the tokens before
        them in two passes, like two turns of a conversation. Meanwhile, the model's sliding windows are
        limited to a few tokens.

        If the logits differ, the session turns off features, one after another, until they agree: reading in
        parts, decoding in fixed shapes, its own code, and keeping keys and values. If the comparison fails
        with an exception, the session turns off decoding in fixed shapes, and also keeping keys and values if
        the logits then agree.

        ``warning`` is set if answers become slower, because the session keeps no keys and values or uses only
        the code of transformers and peft. It is also set if the logits still differ or could not be compared.
        """
        session = self._session
        ids = prompt[-TOKENS:]
        if adapter_name in session.checked or adapter_name in self._not_checkable or len(ids) < 2:
            return
        compare = partial(self._compare, adapter_name, ids)
        try:
            comparison = session.checked[adapter_name] = compare()
            if not comparison.agrees and self._agrees_without("reads_in_parts", adapter_name, compare):
                return
            if not comparison.agrees and session.steps is not None and session.steps.in_use:
                session.steps.turn_off(
                    "In fixed shapes, the logits differed from those of transformers and peft by "
                    f"{comparison.difference:.2g} times their standard deviation; rounding alone accounts "
                    f"for about {comparison.noise:.2g}."
                )
                session.forget_conversations()
                comparison = session.checked[adapter_name] = compare()
            if comparison.agrees:
                return
            session.use_library_code()
            again = compare()
            if not again.agrees and self._agrees_without_cache(adapter_name, compare):
                return
        except Exception as error:
            if self._agrees_without_cache(adapter_name, compare):
                return
            # An answer without this check is better than no answer.
            self._not_checkable.add(adapter_name)
            lines = str(error).strip().splitlines() or [""]
            session.warning = (
                "These answers could not be checked against transformers and peft: "
                f"{type(error).__name__}: {lines[0]}."
            )
            if session.steps is not None:
                session.steps.turn_off("Answers could not be checked against transformers and peft.")
            return
        how = (
            f"the logits of the next token differed from those of transformers and peft by "
            f"{comparison.difference:.2g} times their standard deviation (rounding alone accounts for about "
            f"{comparison.noise:.2g})"
        )
        session.warning = (
            f"Answers are slower: {how}. This chat now runs the code of transformers and peft, and its "
            f"results match theirs."
            if again.agrees
            else f"Do not rely on these answers: {how}, and still by {again.difference:.2g} with the layers "
            f"of transformers and peft. Please report the model and the version of transformers."
        )

    def _compare(self, adapter_name: str, ids: list[int]) -> LogitsComparison:
        session = self._session
        with session.short_windows():
            return compare_logits(
                self._model,
                session.compute_device.dtype,
                lambda: self._logits(adapter_name, ids),
                lambda: session.library_logits(adapter_name, ids),
            )

    def _logits(self, adapter_name: str, ids: list[int]) -> Tensor:
        """Return the session's logits (2, vocabulary) after the last two of ``ids``."""
        session = self._session
        prefix_cache = session.new_cache()
        # Two positions are compared, so that a position that never advances is detected.
        read = len(ids) - min(2, len(ids) - 1)
        ends = [read, *range(read + 1, len(ids) + 1)]
        if session.reads_in_parts and read > 1:
            ends.insert(0, read // 2)
        return torch.cat(
            [
                session.next_logits(adapter_name, ids[start:end], prefix_cache).clone()
                for start, end in pairwise([0, *ends])
            ][-2:]
        )

    def _agrees_without_cache(self, adapter_name: str, compare: Callable[[], LogitsComparison]) -> bool:
        """Stop keeping keys and values if the logits then equal the libraries' logits.

        If they do, set the session's warning and return True. Decoding in fixed shapes is turned off in any
        case. Some model classes have their own cache or none, or count positions in one layer of the cache.
        """
        session = self._session
        if session.steps is not None:
            session.steps.turn_off("This model is run without a KV cache.")
        if not self._agrees_without("keeps_keys", adapter_name, compare):
            return False
        session.warning = (
            "Answers are slower: with a KV cache, this model's logits differ from those that transformers "
            "and peft compute without one. So the whole conversation is computed again for each token."
        )
        return True

    def _agrees_without(
        self,
        setting: Literal["reads_in_parts", "keeps_keys"],
        adapter_name: str,
        compare: Callable[[], LogitsComparison],
    ) -> bool:
        """Turn a setting off if the logits then equal the libraries' logits; return whether they do."""
        session = self._session
        setattr(session, setting, False)
        session.forget_conversations()
        try:
            comparison = compare()
        except Exception:  # models raise any exception
            comparison = None
        if comparison is None or not comparison.agrees:
            setattr(session, setting, True)
            return False
        session.checked[adapter_name] = comparison
        return True
