from __future__ import annotations

from pathlib import Path

import pytest

from qlora_tui.formatting import abbreviate_home


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HOME/data/a.jsonl: line 3.", "~/data/a.jsonl: line 3."),
        ("Move 'HOME/a' to HOME/b.", "Move '~/a' to ~/b."),
        ("/mnt/HOME/a and HOMEother/a stay.", "/mnt/HOME/a and HOMEother/a stay."),
    ],
)
def test_paths_in_the_home_folder_begin_with_a_tilde(text: str, shown: str) -> None:
    home = str(Path.home())
    assert abbreviate_home(text.replace("HOME", home)) == shown.replace("HOME", home)
