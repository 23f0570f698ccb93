"""The process that runs one job with llama.cpp: JSON on stdin, JSON on stdout, llama.cpp's log on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaCppError, LlamaModel
from qlora_tui.export.llama_cpp.jobs import (
    Compare,
    Compared,
    ComparedPrompt,
    Job,
    JobResult,
    LlamaFailure,
    Load,
    Loaded,
    Quantize,
    Quantized,
    RowsCompared,
)
from qlora_tui.export.llama_cpp.stored_answers import (
    AnswerReader,
    kl_divergence,
    log_softmax,
    positions_at_once,
)
from qlora_tui.subprocesses import end_with_parent


def run(job: Job, on_progress: Callable[[int, int], None] = lambda done, total: None) -> JobResult:
    """Run a job. ``on_progress`` gets the rows compared and in all."""
    try:
        llama = LlamaCpp()
        match job:
            case Load():
                return Loaded()
            case Quantize():
                llama.quantize(job.source, job.target, job.file_type)
                return Quantized(Path(job.target).stat().st_size)
            case Compare():
                context = max(len(row.computed_ids) for row in job.rows)
                with llama.open(job.model, context=context, lora=job.lora, exact=job.exact) as model:
                    return _compare(model, job, on_progress)
    except (LlamaCppError, OSError) as error:
        return LlamaFailure(str(error))


def _compare(model: LlamaModel, job: Compare, on_progress: Callable[[int, int], None]) -> Compared:
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
        on_progress(done, computed)
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


def main() -> None:
    """Run the job on stdin; a line of JSON for each progress, and one for the result."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    # llama.cpp prints to stdout too: give it stderr, and write the result to what was stdout.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def write(message: RowsCompared | JobResult) -> None:
        results.write(msgspec.json.encode(message) + b"\n")
        results.flush()

    write(run(job, lambda done, total: write(RowsCompared(done, total))))
    results.close()


if __name__ == "__main__":
    end_with_parent()
    main()
