"""A base model in memory, with its adapters.

All adapters share one copy of the base. The active adapter can change between two tokens, so two answers can
be generated side by side.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from threading import Event
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from qlora_tui.chat.adapters import AdapterSet
from qlora_tui.chat.batches import Batches
from qlora_tui.chat.chat_types import BASE, ChatSource, Sampling, ThinkingSupport
from qlora_tui.chat.completion import CompletionStream, completion_constraint, completion_prompt
from qlora_tui.chat.completion_types import Completion
from qlora_tui.chat.constraints import Calls, Constraint, Grammars
from qlora_tui.chat.cpu import grouped_heads
from qlora_tui.chat.decoding import (
    DecodeStep,
    DecodeSteps,
    Forward,
    PrefixCache,
    TokenReader,
    free_gpu_bytes,
    record_cuda_graph,
)
from qlora_tui.chat.generation import PREFILL_CHUNK_TOKENS, AnswerStream
from qlora_tui.chat.logits import LogitsComparison, ModelHead, library_code, use_library_code
from qlora_tui.chat.session_check import SessionCheck
from qlora_tui.data.conversation import Message, RowRejectedError
from qlora_tui.data.render import prompt_text, prompt_text_ids
from qlora_tui.data.thought_splitter import ThoughtSplitter
from qlora_tui.data.tokenizer import AnswerDecoder, ChatTokenizer
from qlora_tui.data.tokenizer_files import panics_as_errors
from qlora_tui.data.tool_calls import CallFormat, call_format
from qlora_tui.errors import EXIT_USAGE, UserError, first_line
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.schema import Thinking
from qlora_tui.runs.directory import run_of
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.checks.attention import short_windows
from qlora_tui.training.compute_device import ComputeDevice, free_host_bytes
from qlora_tui.training.option_scores import Choice, OptionScorer, Scores

_TRIED_CHARACTERS = 16
"""A prompt with more characters than this per token of the context is first tokenized only in part."""


class ChatSession:
    """A loaded model with its adapters. Not thread-safe, except for the ``stop`` event of an answer."""

    def __init__(
        self, source: ChatSource, model: Any, tokenizer: ChatTokenizer, device: ComputeDevice
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.compute_device = device
        self.device = device.torch_device
        config = model.config.get_text_config()
        self.context_length = int(getattr(config, "max_position_embeddings", 1 << 30))
        self._shares_keys = bool(getattr(config, "num_kv_shared_layers", 0))
        """Whether layers share keys. In such models, these layers compute only one token if
        ``logits_to_keep`` is an integer.
        """
        self.end_ids = frozenset(tokenizer.turn_end_ids) | _model_ends(model)
        self._decoder = AnswerDecoder(tokenizer)
        self._model = model
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        """Number of rows of the embedding."""
        self._adapters = AdapterSet(model, source.adapters)
        self._held: set[Path] = set()
        self.offer(source.adapters)
        self.head = ModelHead(model)
        self._scorer = OptionScorer(model, device.dtype, device.torch_device)
        self._caches: dict[str, PrefixCache] = {}
        self.steps: DecodeSteps | None = None
        """Decoding steps in fixed shapes; None on a CPU."""
        if device.kind == "cuda":
            self.steps = DecodeSteps(
                self._step_forward, record_cuda_graph, partial(free_gpu_bytes, self.device), self.device
            )
        self._is_noted = False
        self._reader = TokenReader(self.device)
        self.checked: dict[str, LogitsComparison] = {}
        """Comparison with the libraries' logits, by adapter name; made before the adapter's first answer."""
        self.keeps_keys = True
        """Whether keys and values are kept between tokens."""
        self.reads_in_parts = True
        """Whether a text may be processed in several passes.

        Some recurrent layers start from an empty state in each pass of several tokens, and some caches treat
        the tokens of the first pass as the prompt.
        """
        self.warning = ""
        """Warning about how this session computes; empty if there is none."""
        self._groups_heads = device.kind == "cpu"
        """Whether attention of one token computes the query heads of each key head together."""
        takes = signature(model.forward).parameters
        self.batches = Batches(self)
        self._check = SessionCheck(self, model)
        self._grammars: Grammars | None = None
        # The name of the argument changes within transformers 5.
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        self._takes_positions = "position_ids" in takes

    def offer(self, adapters: Mapping[str, str]) -> None:
        """Replace the available adapters (name to folder).

        Adapters that are no longer available stay in memory until another adapter is loaded.
        """
        self.source = replace(self.source, adapters=dict(adapters))
        self._adapters.folders = adapters
        # Whoever deletes a run is warned while its adapter can be loaded here.
        runs = {run.path for path in adapters.values() if (run := run_of(Path(path))) is not None}
        for folder in runs - self._held:
            if (handle := hold_folder(folder)) is not None:
                weakref.finalize(self, os.close, handle)
        self._held |= runs

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Return the available names, such as ``base``, ``adapter`` and ``step-120``."""
        return self.source.adapter_names

    @property
    def thinking(self) -> ThinkingSupport:
        """Return how the chat template supports thinking."""
        traits = self.tokenizer.traits
        if traits.switch is None:
            return ThinkingSupport(kind="always" if traits.opens_thought else "none")
        switch = traits.switch
        return ThinkingSupport(
            kind="switch" if switch.can_turn_off else "effort",
            variable=switch.variable,
            off=str(switch.off[switch.variable]),
            default=switch.default,
        )

    @property
    def prefill_tokens(self) -> int:
        """Return the maximum number of prompt tokens in one pass."""
        return PREFILL_CHUNK_TOKENS if self.reads_in_parts else self.context_length

    def take_note(self) -> str:
        """Return why answers on a GPU are generated without a CUDA graph, once; otherwise an empty text."""
        if self.steps is None or self._is_noted or not self.steps.why_not:
            return ""
        self._is_noted = True
        return f"Answers are generated without a CUDA graph. {self.steps.why_not}"

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of the weights, including adapters."""
        return int(self._model.get_memory_footprint())

    def ask(
        self,
        messages: Sequence[Message],
        *,
        adapter_name: str = BASE,
        sampling: Sampling | None = None,
        stop: Event | None = None,
        thinking: Thinking = "auto",
    ) -> AnswerStream[PrefixCache]:
        """Start the answer to a conversation that ends with the user's turn; ``stop`` ends the answer.

        ``thinking`` is on, off or ``auto``, which uses the setting of the source. Earlier answers are passed
        with their reasoning, of which the chat template keeps the same part as in training.

        Raises UserError if the adapter cannot be loaded, the chat template rejects the conversation, or the
        conversation exceeds the model's context. Only the latest answer of each adapter may be in progress.
        """
        prompt = self.prompt(messages, thinking)
        self.ensure_loaded(adapter_name)
        self.check(adapter_name, prompt)
        if adapter_name not in self._caches or not self.keeps_keys:
            self._caches[adapter_name] = self.new_cache()
        prefix_cache = self._caches[adapter_name]
        splitter = self.splitter(prompt)
        return AnswerStream(
            self, adapter_name, prompt, prefix_cache, sampling or Sampling(), stop or Event(), splitter
        )

    def splitter(self, prompt: list[int]) -> ThoughtSplitter:
        """Return a splitter of thoughts and answer. ``prompt`` may already have opened a thought."""
        return self._decoder.splitter(prompt)

    def complete(self, completion: Completion, stop: Event) -> CompletionStream:
        """Start a completion. Setting ``stop`` ends it. Any number of completions may be in progress.

        Raises UserError if the adapter cannot be loaded, the prompt is rejected, empty or too long, the
        schema cannot be used, or a call is required but the template's call format is unknown.
        """
        prompt = completion_prompt(self, completion)
        constraint = completion_constraint(self, completion)
        self.ensure_loaded(completion.adapter_name)
        self.check(completion.adapter_name, prompt)
        calls = self.call_format if completion.tools else None
        return CompletionStream(self, completion, prompt, constraint, calls, stop)

    @cached_property
    def call_format(self) -> CallFormat | None:
        """Return how the chat template writes calls; None if unknown."""
        return call_format(self.tokenizer)

    def constraint(self, schema: dict[str, Any] | None, calls: Calls | None, thinks: bool) -> Constraint:
        """Return a constraint of an answer; with ``thinks``, a thought may precede it. Raises UserError."""
        self._grammars = self._grammars or Grammars(self.tokenizer, self.vocabulary, self.end_ids)
        return self._grammars.constraint(schema, calls, self._decoder.mark_tokens if thinks else ())

    def decoder_of(self, calls: CallFormat) -> AnswerDecoder:
        """Return a decoder for answers with calls, which keeps special tokens that mark calls."""
        return self._decoder.keeping(calls.literals)

    def check_length(self, tokens: int) -> None:
        """Raise UserError if ``tokens`` tokens exceed the context.

        They include the tokens of the answer for which there must be room, usually one.
        """
        if tokens > self.context_length:
            raise self._too_long(f"{tokens - 1:,}")

    def tokenize(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Tokenize a prompt. Raises UserError if it is too long.

        If a prompt is far longer than the context, only its beginning is tokenized to reject it.
        """
        most = 2 * self.context_length
        size = _TRIED_CHARACTERS * self.context_length
        while size < len(text):
            if len(encode(text[:size])) > most:
                raise self._too_long(f"more than {most:,}")
            size *= 2
        return encode(text)

    def _too_long(self, tokens: str) -> UserError:
        return UserError(
            "The conversation is too long",
            what=f"The conversation has {tokens} tokens; the model's context is at most "
            f"{self.context_length:,}.",
            fix="Start a new conversation, or shorten the question.",
            exit_code=EXIT_USAGE,
        )

    def ensure_loaded(self, adapter_name: str) -> None:
        """Load ``adapter_name`` unless it is loaded.

        After loading, free adapters that are no longer available, except those with an answer in progress.
        Raises UserError if the adapter cannot be loaded.
        """
        if not self._adapters.ensure_loaded(adapter_name):
            return
        for name in self._adapters.no_longer_offered:
            if self.batches.forget(name):
                self._adapters.unload(name)
                self._caches.pop(name, None)
                self.checked.pop(name, None)
        if self.steps is not None:
            # A CUDA graph uses addresses of weights, which loading may move.
            self.steps.forget()

    def new_cache(self) -> PrefixCache:
        """Return an empty cache for one conversation."""
        free_bytes = self.steps.free_bytes if self.steps else None
        return PrefixCache(self._model.config, free_bytes, self.context_length)

    def check(self, adapter_name: str, prompt: list[int]) -> None:
        """Compare the logits of a loaded adapter with the libraries', once; see :class:`SessionCheck`."""
        self._check.run(adapter_name, prompt)

    def forget_conversations(self) -> None:
        """Drop the keys and values of the chat's conversations.

        With its next question, each conversation is processed again from the beginning.
        """
        self._caches.clear()

    def use_library_code(self) -> None:
        """Compute with transformers and peft alone from now on."""
        use_library_code(self._model)
        self._groups_heads = False
        self._adapters.use_peft()
        self.forget_conversations()

    @torch.inference_mode()
    def library_logits(self, adapter_name: str, token_ids: list[int]) -> Tensor:
        """Return transformers' and peft's own logits (2, vocabulary) after the last two of ``token_ids``."""
        with library_code(self._model), self._adapters.through_peft(adapter_name):
            output = self._model(input_ids=torch.tensor([token_ids], device=self.device), use_cache=False)
        return output.logits[0, -2:]  # type: ignore[no-any-return]  # transformers' outputs are untyped

    def prompt(
        self,
        messages: Sequence[Message],
        thinking: Thinking = "auto",
        tools: Sequence[dict[str, Any]] = (),
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins. Raises UserError."""
        wanted = self.source.thinking if thinking == "auto" else thinking
        try:
            text = prompt_text(messages, self.tokenizer, tools, wanted, template_variables)
            prompt = self.tokenize(text, partial(prompt_text_ids, tokenizer=self.tokenizer))
        except RowRejectedError as refused:
            raise UserError(
                "The chat template refuses this conversation",
                what=refused.reason,
                fix="Omit the system prompt, or start over with a question.",
                exit_code=EXIT_USAGE,
            ) from refused
        self.check_length(len(prompt) + 1)
        return prompt

    @torch.inference_mode()
    def next_logits(
        self, adapter_name: str, token_ids: list[int], prefix_cache: PrefixCache, *, every: bool = False
    ) -> Tensor:
        """Add ``token_ids`` to the cache, and return the logits (1, vocabulary) after the last of them.

        With ``every``, return the logits (tokens, vocabulary) after each of them.
        """
        wanted = len(token_ids) if every else 1
        apart = len(token_ids) > 1 and not self.reads_in_parts
        if apart or prefix_cache.outdated_by(len(token_ids)):
            token_ids = prefix_cache.token_ids + token_ids
            prefix_cache.clear()
        if len(token_ids) == 1 and (step := self._step(adapter_name, prefix_cache)):
            token = torch.tensor([token_ids], device=self.device)
            if (after := self._run(step, token, prefix_cache)) is not None:
                prefix_cache.add_step(token_ids[0])
                return after
        self._adapters.activate(adapter_name)
        if not self.keeps_keys:
            prefix_cache.token_ids += token_ids
            tokens = torch.tensor([prefix_cache.token_ids], device=self.device)
            logits: Tensor = self._compute(input_ids=tokens, use_cache=False).logits
            return logits[0, -wanted:]
        prefix_cache.reserve(len(token_ids))
        last: int | Tensor = 1
        if wanted > 1 or (len(token_ids) > 1 and self.device.type == "cpu" and not self._shares_keys):
            # An index, because the layout of a slice of several rows makes a CPU copy the whole head.
            last = torch.arange(len(token_ids) - wanted, len(token_ids), device=self.device)
        try:
            output = self._compute(
                input_ids=torch.tensor([token_ids], device=self.device),
                use_cache=True,
                logits_to_keep=last,
                **{self._cache_argument: prefix_cache.cache},
            )
        except BaseException:
            # Some layers may have processed the tokens and others not.
            prefix_cache.clear()
            raise
        prefix_cache.token_ids += token_ids
        return output.logits[0, -wanted:]  # type: ignore[no-any-return]  # transformers' outputs are untyped

    @torch.inference_mode()
    def batch_logits(
        self, adapter_name: str, token_ids: list[int], lengths: list[int], longest: int, cache: Any
    ) -> Tensor:
        """Process one more token of each row, add it to the cache, and return the logits (rows, vocabulary).

        Args:
            adapter_name: The adapter to compute with.
            token_ids: The new token of each row.
            lengths: Number of tokens in each row so far. All rows end at the same place of the cache.
            longest: Number of places in the cache so far. Places before a shorter row are padding.
            cache: The common cache of the rows.
        """
        self._adapters.activate(adapter_name)
        positions = torch.tensor(lengths, device=self.device)[:, None]
        arguments: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        if min(lengths) < longest:
            places = torch.arange(longest + 1, device=self.device)
            arguments["attention_mask"] = (places >= longest - positions).long()
        output = self._compute(
            input_ids=torch.tensor(token_ids, device=self.device)[:, None],
            use_cache=True,
            logits_to_keep=1,
            **arguments,
            **{self._cache_argument: cache},
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]  # transformers' outputs are untyped

    def short_windows(self) -> AbstractContextManager[None]:
        """Shorten every sliding window of the model to a few tokens inside the block."""
        return short_windows(self._model)

    def free_bytes(self) -> int:
        """Return the free memory of the device, in bytes."""
        return free_host_bytes() if self.device.type == "cpu" else free_gpu_bytes(self.device)

    def _compute(self, **arguments: Any) -> Any:
        """Return the model's output."""
        with self._attention():
            return self._model(**arguments)

    def _attention(self) -> AbstractContextManager[None]:
        return grouped_heads() if self._groups_heads else nullcontext()

    @torch.inference_mode()
    def next_logits_ahead(
        self, adapter_name: str, token: Tensor, prefix_cache: PrefixCache
    ) -> tuple[int, Tensor] | None:
        """Start the recorded step of ``token`` (1, 1), and read the token while the GPU computes.

        Returns the token's id and the logits (1, vocabulary) after it, which the next call overwrites.
        Returns None, without processing ``token``, if no step is recorded or the step fails.
        """
        if prefix_cache.outdated_by(1):
            return None
        step = self._step(adapter_name, prefix_cache)
        if self.steps is None or step is None:
            return None
        if not self.steps.record_if_due(step, self.checked.get(adapter_name)):
            self._read_again(adapter_name, prefix_cache)
        if not step.is_recorded:
            return None
        self._reader.start(token)
        logits = self._run(step, token, prefix_cache)
        if logits is None:
            return None
        token_id = self._reader.wait()
        prefix_cache.add_step(token_id)
        return token_id, logits

    def _read_again(self, adapter_name: str, prefix_cache: PrefixCache) -> None:
        """Process the cache's tokens again, after a step that failed."""
        token_ids = prefix_cache.token_ids
        prefix_cache.clear()
        for start in range(0, len(token_ids), self.prefill_tokens):
            self.next_logits(adapter_name, token_ids[start : start + self.prefill_tokens], prefix_cache)

    def _step(self, adapter_name: str, prefix_cache: PrefixCache) -> DecodeStep | None:
        return self.steps.step(adapter_name, prefix_cache) if self.steps is not None else None

    def _run(self, step: DecodeStep, token: Tensor, prefix_cache: PrefixCache) -> Tensor | None:
        """Run a step. If it fails, return None and compute no more steps."""
        try:
            return step.run(token, len(prefix_cache.token_ids))
        except Exception as error:
            # Models raise any exception. If the GPU is at fault, the usual code raises the exception again.
            assert self.steps is not None
            prefix_cache.step = None
            self.steps.turn_off(f"The model cannot decode in fixed shapes: {first_line(error).rstrip('.')}.")
            return None

    def _step_forward(self, adapter_name: str) -> Forward:
        """Return the function that a decoding step of ``adapter_name`` runs."""

        def forward(token: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
            self._adapters.activate(adapter_name)
            positions = {"position_ids": position_ids} if self._takes_positions else {}
            output = self._model(
                input_ids=token,
                use_cache=True,
                logits_to_keep=1,
                **positions,
                **{self._cache_argument: cache},
            )
            return output.logits[:, -1]  # type: ignore[no-any-return]  # transformers' outputs are untyped

        return forward

    @torch.inference_mode()
    def logits_at(self, adapter_name: str, token_ids: list[int], positions: list[int]) -> Tensor:
        """Return the logits (positions, vocabulary) after each position, computed without a cache."""
        self._adapters.activate(adapter_name)
        output = self._compute(
            input_ids=torch.tensor([token_ids], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(positions, device=self.device),
        )
        return output.logits[0]  # type: ignore[no-any-return]  # transformers' outputs are untyped

    def greedy_batch(
        self, adapter_name: str, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> list[tuple[int, ...]]:
        """Return the greedy answers to prompts, computed together, as token ids including the turn end.

        Raises UserError if the memory is full.
        """
        self._adapters.activate(adapter_name)
        with reported_memory(self.compute_device), self._attention():
            return answer_greedily(self._model, prompts, self.tokenizer, self.device, max_new_tokens)

    def score_options(
        self,
        adapter_name: str,
        choices: Sequence[Choice],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Scores]:
        """Return the log probabilities of the options of each choice, in order.

        ``progress`` is called with the number of choices done. Raises UserError if the adapter cannot be
        loaded or the memory is full.
        """
        self.ensure_loaded(adapter_name)
        self._adapters.activate(adapter_name)
        with reported_memory(self.compute_device):
            return self._scorer.score(choices, progress)

    def answer_batch(
        self, adapter_name: str, conversations: Sequence[Sequence[Message]], max_new_tokens: int
    ) -> list[tuple[str, bool]]:
        """Return the greedy answer to each conversation, without thoughts, and whether it ended its turn.

        Raises UserError for the same reasons as :meth:`ask`, and if the memory is full.
        """
        prompts = [self.prompt(messages) for messages in conversations]
        self.ensure_loaded(adapter_name)
        self.check(adapter_name, prompts[0])
        answers = self.greedy_batch(adapter_name, prompts, max_new_tokens)
        return [
            (self._decoder.answer(prompt, ids), ids[-1] in self.tokenizer.turn_end_ids)
            for prompt, ids in zip(prompts, answers, strict=True)
        ]

    def activate(self, adapter_name: str) -> None:
        """Make ``head`` compute with a loaded adapter, or with the base alone."""
        self._adapters.activate(adapter_name)

    def head_inputs(
        self, adapter_name: str, token_ids: list[int], positions: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the output layer's inputs (positions, width), and the logits (vocabulary,) of the first
        position.

        ``head.logits`` computes the logits of the other positions while the adapter is active.
        """
        self._adapters.activate(adapter_name)
        return self.head.inputs_of(
            lambda: self._compute(
                input_ids=torch.tensor([token_ids], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(positions, device=self.device),
            )
        )

    @torch.no_grad()
    def change_base(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Replace each floating-point base weight by ``change(name, weight)``.

        ``name`` is the name in the model's files.
        """
        for name, parameter in self._model.named_parameters():
            is_trained = "lora_" in name or ".modules_to_save." in name
            if not is_trained and parameter.is_floating_point():
                stored = name.removeprefix("base_model.model.").replace(".base_layer", "")
                stored = stored.replace(".original_module", "")
                parameter.copy_(change(stored, parameter.data))

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text on its own."""
        with panics_as_errors():
            return len(self.tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text. Special tokens are omitted, except the marks around thoughts."""
        return self._decoder.decode(token_ids)


@contextmanager
def reported_memory(device: ComputeDevice) -> Iterator[None]:
    """Raise UserError if the memory of the GPU or the machine runs out inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "Out of GPU memory" if device.kind == "cuda" else "Out of memory",
            what=f"The model and this conversation need more memory than is free on {device.name}.",
            fix="Close other programs that use this memory, pause a run, or start a shorter conversation.",
        ) from error


def _model_ends(model: Any) -> frozenset[int]:
    """Return the end-of-sequence tokens in the model's own generation settings."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)
