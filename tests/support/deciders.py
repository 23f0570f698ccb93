"""Decisions of a tiny model, as if they had been measured."""

from __future__ import annotations

from pathlib import Path

from qlora_tui.data.decisions import Decision
from qlora_tui.data.formats import RowFormat
from qlora_tui.data.render import DEFAULT
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.runs.task_metrics.decisions import Calibration, Decider, write_decider


def put_decider(model: Path, adapter: Path, *options: str, fields: tuple[str, ...] = ()) -> Decider:
    """Let an adapter of a model decide between options."""
    from qlora_tui.training.decisions import rendered_answer

    tokenizer = ChatTokenizer.from_folder(model)
    decider = Decider(
        decision=Decision(options=options, fields=fields),
        option_ids=tuple(rendered_answer(option, tokenizer, DEFAULT) for option in options),
        calibration=Calibration(temperature=2.0, rows=99),
        layout=RowFormat("decision", {"text": "text", "label": "label"}),
    )
    write_decider(adapter, decider)
    return decider
