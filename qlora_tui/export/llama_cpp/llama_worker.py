"""Jobs that :mod:`.llama_process` runs in processes of their own: an assertion in llama.cpp ends a
process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from qlora_tui.errors import UserError
from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError, LlamaModel
from qlora_tui.export.llama_cpp.jobs import Compare, Compared, ComparedPrompt, Quantize, Quantized
from qlora_tui.export.llama_cpp.stored_answers import (
    AnswerReader,
    kl_divergence,
    log_softmax,
    positions_at_once,
)
from qlora_tui.worker import Report


def load() -> None:
    """Load the library, and do nothing with it. Raises UserError."""
    with _errors():
        LlamaCpp()


def quantize(job: Quantize) -> Quantized:
    """Quantize a GGUF file. Raises UserError."""
    with _errors():
        LlamaCpp().quantize(job.source, job.target, job.file_type)
        return Quantized(Path(job.target).stat().st_size)


def compare(job: Compare, report: Report) -> Compared:
    """Compare a GGUF file with stored answers; ``report`` gets the rows compared. Raises UserError."""
    context = max(len(row.computed_ids) for row in job.rows)
    with _errors(), LlamaCpp().open(job.model, context=context, lora=job.lora, exact=job.exact) as model:
        return _compare(model, job, report)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (LlamaCppError, OSError) as error:
        raise UserError("llama.cpp failed", what=f"llama.cpp: {error}.") from error


def _compare(model: LlamaModel, job: Compare, report: Report) -> Compared:
    reference, vocabulary = AnswerReader(job.reference), job.reference.vocabulary
    ends = np.array(job.end_ids)
    computed = sum(bool(row.positions) for row in job.rows)
    different, divergences, targets, choices, expected_choices, start, done = [], [], [], [], [], 0, 0
    for number, row in enumerate(job.rows):
        if row.text and not row.ids == tuple(model.tokenize(row.text)) == tuple(
            model.prompt_tokens(row.text)
        ):
            different.append(number)
        if not row.positions:
            continue
        for part in model.logits(row.computed_ids, row.positions, positions_at_once(vocabulary)):
            logits = part[:, :vocabulary]
            expected = reference.log_probabilities(start, start + len(logits))
            start += len(logits)
            divergences.append(kl_divergence(expected, log_softmax(logits)))
            expected_choices.append(expected.argmax(-1))
            choices.append(logits.argmax(-1))
        targets += [row.ids[place + 1] for place in row.positions]
        done += 1
        report(done, computed)
    whole, chosen, expected_chosen = (
        np.concatenate(parts) for parts in (divergences, choices, expected_choices)
    )
    at_end = np.isin(targets, ends)
    return Compared(
        template=model.template,
        different_tokens=tuple(different),
        different_prompts=_different_prompts(model, job.prompts),
        first_tokens=tuple(model.tokenize("", add_special=True)),
        overrun_ids=tuple(token for token in job.end_ids if not model.ends_answer(token)),
        positions=len(whole),
        divergence=float(whole.mean()),
        worst=float(whole.max()),
        top1_matches=int((chosen == expected_chosen).sum()),
        turns=int(at_end.sum()),
        turns_ended=int((at_end & np.isin(chosen, ends)).sum()),
        turns_ended_by_reference=int((at_end & np.isin(expected_chosen, ends)).sum()),
    )


def _different_prompts(model: LlamaModel, prompts: Sequence[ComparedPrompt]) -> int | None:
    rendered = [model.render_prompt(prompt.turns) for prompt in prompts]
    if not rendered or None in rendered:
        return None
    return sum(ours.text != theirs for ours, theirs in zip(prompts, rendered, strict=True))
