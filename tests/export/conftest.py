"""The tiny model and adapters of the chat's tests, and workers of llama.cpp that start at once."""

from tests.chat.conftest import tiny_model, tiny_source
from tests.support.quick_starts import quick_workers_if_slow

__all__ = ["quick_workers_if_slow", "tiny_model", "tiny_source"]
