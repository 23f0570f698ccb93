"""``/v1/decide``: labels with their probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import FIRST, SECOND, Served
from tests.support.deciders import put_decider

pytestmark = pytest.mark.slow


def test_a_decision_has_a_label_and_probabilities(served: Served, tiny_model: Path) -> None:
    refused = served.post("/decide", model=SECOND, input="what is the fox")
    assert refused.status_code == 400 and f"measured for {SECOND}." in refused.json()["error"]["message"]
    decider = put_decider(
        tiny_model,
        served.run(FIRST).adapter_dir,
        '{"color": "red", "old": true}',
        '{"color": "red", "old": false}',
        '{"color": "blue", "old": true}',
        fields=("color", "old"),
    )
    decided = served.post("/decide", model=FIRST, input="what is the fox", threshold=1.0).json()
    assert decided["label"] in decider.decision.options and decided["calibrated"] and decided["abstain"]
    assert sum(decided["probabilities"].values()) == pytest.approx(1)
    assert decided["probability"] == max(decided["probabilities"].values())
    assert sum(decided["fields"]["color"].values()) == pytest.approx(1)
    messages = [{"role": "user", "content": "what is the fox"}]
    same = served.post("/decide", model=FIRST, messages=messages).json()
    assert same["probabilities"] == decided["probabilities"] and not same["abstain"]
    checkpoint = served.post("/decide", model=f"{FIRST}:2", messages=messages).json()
    assert not checkpoint["calibrated"] and checkpoint["probabilities"] != decided["probabilities"]
    wrong: dict[str, Any]
    for wrong in ({}, {"input": "x", "messages": messages}, {"input": "x", "threshold": 2}):
        assert served.post("/decide", model=FIRST, **wrong).status_code == 400
    long = served.post("/decide", model=FIRST, input="what is the fox " * 1000)
    assert long.status_code == 400 and "too long" in long.json()["error"]["message"]
    assert served.post("/decide", model="none", input="x").status_code == 404
