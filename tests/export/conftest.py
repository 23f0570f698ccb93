"""The tiny model and adapters of the chat's tests."""

from tests.chat.conftest import tiny_model, tiny_source

__all__ = ["tiny_model", "tiny_source"]
