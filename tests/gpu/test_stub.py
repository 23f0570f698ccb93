from __future__ import annotations

import pytest

from qlora_tui.gpu.no_gpu import NoGpu
from qlora_tui.gpu.visible import torch_card
from tests.gpu.stub import play_in_this_process


def test_a_card_is_gone_when_the_test_that_played_it_is_over() -> None:
    with pytest.MonkeyPatch.context() as patch:
        play_in_this_process(patch, "card")
        assert torch_card().short_name == "RTX 4090"
    with pytest.raises(NoGpu):
        torch_card()
