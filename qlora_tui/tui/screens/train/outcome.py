"""The outcome of a run in the first panel of the live pane: the result or the reason, and what to do."""

from __future__ import annotations

import re

from textual.content import Content

from qlora_tui.formatting import abbreviate_home, capitalize
from qlora_tui.runs.events import ALL_STEPS_DONE, Failed, Finished
from qlora_tui.runs.result_weights import better_step, weights_words
from qlora_tui.runs.status import BROKEN, RESUMABLE
from qlora_tui.runs.view import finite_losses
from qlora_tui.tui.key_names import highlight_keys, key_name
from qlora_tui.tui.render.columns import hanging
from qlora_tui.tui.render.labels import verdict_content
from qlora_tui.tui.screens.train.run_follower import RunSnapshot

_GAP = "  "
"""Text between two keys."""
_KEY_FIRST = re.compile(r"[▸ ] \[\S+\] ")


def outcome_text(snapshot: RunSnapshot, active: str = "", answers: str = "") -> Content | None:
    """Return the outcome of a run, the reason, and what to do; None while the run is active or queued.

    Args:
        snapshot: The run.
        active: Id of another run that is training now; empty if there is none.
        answers: Progress of comparing this run's answers; empty if they are not being compared.
    """
    status, view = snapshot.status, snapshot.view
    is_error = status.state in BROKEN
    headline, text, details, offers = "", status.detail, "", []
    failed = view.ending if status.state == "failed" and isinstance(view.ending, Failed) else None
    closing_is_enough = failed is not None and failed.others_held_enough
    if status.state in (*RESUMABLE, "lost"):
        has_begun = view.checkpoints or view.attempt
        resume = f"resume from step {resume_step(snapshot):,}" if has_begun else "queue it"
        offers.append(f"{key_name('train.resume')} {resume}")
    match status.state:
        case "finished":
            reason = view.ending.reason if isinstance(view.ending, Finished) else status.detail
            text = "" if reason in ("", ALL_STEPS_DONE) else f"{capitalize(reason)}."
            offers += _uses_of_adapter(snapshot)
        case "failed":
            if failed is not None:
                headline, text, details = _failure_texts(failed)
        case "stopped" | "paused":
            # The first line has the state and the step.
            text = "" if text == f"{capitalize(status.state)} at step {snapshot.step:,}." else text
            if view.checkpoints:
                offers += _uses_of_adapter(snapshot)
        case "unreadable" | "gone":
            offers.append(f"{key_name('train.another')} show other runs")
        case "lost":
            pass
        case _:
            return None
    verdict = snapshot.verdict
    if verdict is not None and verdict.lacks_rows and status.state in ("finished", "stopped") and not answers:
        offers.append(f"{key_name('train.answers')} compare rows")
    offers.append(f"{key_name('train.prepare')} new run")
    if is_error and not headline:
        headline, _, text = text.partition("\n")
    first, *others = text.splitlines() or [""]
    lines = [Content.assemble((headline, "bold $error"), first), *map(Content, others)]
    if verdict is not None and not is_error:
        lines.insert(0, verdict_content(verdict))
    actions = [fix_text(snapshot) if outcome_has_fix(snapshot) else "", _GAP.join(offers)]
    if closing_is_enough:
        actions = [f"{offers[0]}, after closing the other program", actions[0], _GAP.join(offers[1:])]
    lines.append(highlight_keys("▸ " + "\n  ".join(filter(None, actions))))
    lines.append(Content.styled(details, "dim"))
    for note, command, verb in (
        (active and f"{active} is running now.", "train.another", "watch it"),
        (answers and f"Comparing answers: {answers}.", "train.answers", "stop"),
    ):
        if note:
            key = highlight_keys(f"   {key_name(command)} {verb}")
            lines.append(Content.assemble(("● ", "$primary"), note, key))
    return Content("\n").join(line for line in lines if line)


def _failure_texts(failed: Failed) -> tuple[str, str, str]:
    """Return the title of a failure, the text that follows it, and details that come after the actions.

    If memory ran out, the amounts of memory are among the details. If it is enough to close another program,
    the actions say so, and the fix is left out.
    """
    if failed.kind != "out_of_memory":
        texts = f"{failed.title}: ", "\n".join(filter(None, (failed.what, failed.why, failed.fix))), ""
    elif failed.others_held_enough:
        texts = f"{failed.title}. ", failed.why, failed.what
    else:
        texts = f"{failed.title}. ", failed.fix, " ".join(filter(None, (failed.what, failed.why)))
    title, text, details = map(abbreviate_home, texts)
    return title, text, details


def resume_step(snapshot: RunSnapshot) -> int:
    """Return the step from which the run continues when it is resumed: that of its last checkpoint, or 0."""
    return snapshot.view.checkpoints[-1].step if snapshot.view.checkpoints else 0


def outcome_lines(outcome: Content, width: int) -> list[Content]:
    """Return the lines of :func:`outcome_text`, wrapped to ``width`` cells. A line that begins with a key
    continues below the text after the key.
    """
    lines = []
    for line in outcome.split("\n"):
        begins = _KEY_FIRST.match(line.plain)
        cells = begins.end() if begins else 0
        lines += hanging(line[:cells], line[cells:], width)
    return lines


def fix_text(snapshot: RunSnapshot) -> str:
    """Return the key that applies the fix for a warning or for the run's failure, and what the fix does;
    empty if there is no fix.
    """
    return "" if snapshot.fix is None else f"{key_name('train.fix')} {snapshot.fix.label}"


def outcome_has_fix(snapshot: RunSnapshot) -> bool:
    """Return whether :func:`outcome_text` includes the fix, which other panels then leave out."""
    return snapshot.fix is not None and snapshot.status.state in BROKEN


def _uses_of_adapter(snapshot: RunSnapshot) -> list[str]:
    """Return the keys for commands that use the adapter. The keys of Chat and Export come first, with the
    step of the weights that both propose: ``[c] chat, [e] export step 640 (best)``. If the run finished for a
    reason other than that all steps are done, the text has ``it`` instead of the step.
    """
    view, best = snapshot.view, snapshot.best
    last, saved = view.step, [checkpoint.step for checkpoint in view.checkpoints]
    if snapshot.status.state != "finished" and not view.run.adapter_dir.exists():
        last = resume_step(snapshot)
    lowest = None if best is None or best.loss is None else (best.loss, best.step)
    better = better_step(lowest, finite_losses(snapshot.evaluations), saved)
    weights = weights_words(better or last, last=view.step, total=0, best=lowest and lowest[1])
    if isinstance(view.ending, Finished) and view.ending.reason != ALL_STEPS_DONE:
        weights = "it"  # The reason says of which step the adapter is.
    chat, export, card = (key_name(f"train.{name}") for name in ("chat", "export", "card"))
    return [f"{chat} chat, {export} export {weights}", f"{card} card"]
