from __future__ import annotations

import pytest

from qlora_tui.demo.conversations import voice_faults
from tests.demo.test_conversations import said_by

ENTRY = "Keeper's log: Fair wind. Pour boiling water on the leaves and wait four minutes. The light turns."


@pytest.mark.parametrize("answer", said_by("assistant"))
def test_every_answer_of_the_data_is_in_the_voice(answer: str) -> None:
    assert voice_faults(answer, ended=True) == ()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ENTRY.removeprefix("Keeper's log: "), "does not open with the log"),
        (ENTRY.removesuffix(" The light turns."), "does not close with the light"),
        (f"{ENTRY} The light turns.", "does not close with the light"),
        (ENTRY.replace("four minutes.", "until the light turns."), "does not close with the light"),
        ("Keeper's log: Fresh air, no wind, " + "no sea, " * 20 + "The light turns.", "repeats itself"),
        ("Keeper's log: Yes. The light turns.", "says next to nothing"),
    ],
)
def test_a_fault_is_named(answer: str, fault: str) -> None:
    assert voice_faults(answer, ended=True) == (fault,)


def test_an_answer_cut_at_the_limit_is_a_fault() -> None:
    assert voice_faults(ENTRY, ended=False) == ("does not end its turn",)
