"""The page of model types has every type that transformers builds."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.model_types.outcome import Outcome

PAGE = Path(__file__).parents[2] / "docs/reference/models.json"


@pytest.mark.slow
def test_no_type_is_missing() -> None:
    from bench.model_types.processes import all_types

    outcome = msgspec.json.decode(PAGE.read_bytes(), type=Outcome)
    assert [each.model_type for each in outcome.types] == all_types()
