"""What other sequence lengths would cost."""

from __future__ import annotations

import pytest

from qlora_tui.data.dataset_report import LengthCounter
from qlora_tui.runs.length_costs import share_within


@pytest.mark.parametrize("lengths", [[53] * 30 + [2000], [*range(40, 54), *[53] * 20, 1500, 2000]])
def test_a_percentiles_share_is_the_percentage_at_least(lengths: list[int]) -> None:
    counter = LengthCounter("tokens")
    counter.add(lengths, row=1)
    stats = counter.summary()
    for percent, length in ((50, stats.p50), (90, stats.p90), (99, stats.p99)):
        exact = sum(one <= length for one in lengths) / len(lengths)
        assert share_within(stats, length) == exact >= percent / 100
    between = share_within(stats, stats.p90 + 1)
    assert share_within(stats, stats.p90) <= between <= 1
