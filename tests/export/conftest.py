"""The tiny model and adapters of the chat's tests, and workers of llama.cpp that start at once."""

import pytest

from tests.chat.conftest import tiny_model, tiny_source

__all__ = ["tiny_model", "tiny_source"]


@pytest.fixture(autouse=True)
def workers_start_at_once(request: pytest.FixtureRequest) -> None:
    """Workers of llama.cpp have their imports behind them."""
    if request.node.get_closest_marker("slow") is not None:
        request.getfixturevalue("quick_workers")
