"""Reads the metadata that defines the model in a GGUF file, value by value, and detects unread values."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from qlora_tui.catalog.gguf import GgufHeader, gguf_problem
from qlora_tui.errors import UserError

_MAX_COUNT = 1 << 24
"""Upper bound of a count. It is larger than any size in a real model, and the product of two such counts does
not overflow.
"""
_TOLERANCE = 1e-5
"""Maximum relative difference at which two numbers are the same if one was stored in float32."""


_OFF_AT_ZERO = {
    *("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale", "attention.shared_kv_layers"),
    *("attention.sliding_window", "attention.temperature_scale", "attn_logit_softcapping"),
    *("embedding_length_per_layer_input", "embedding_scale", "expert_count", "expert_gating_func"),
    *("expert_group_count", "expert_group_used_count", "expert_shared_count", "expert_used_count"),
    *("expert_shared_feed_forward_length", "expert_weights_norm", "expert_weights_scale"),
    *("final_logit_softcapping", "leading_dense_block_count", "logit_scale", "n_deepstack_layers"),
    *("nextn_predict_layers", "pooling_type", "residual_scale", "router_logit_softcapping"),
}
"""Keys for which 0 means, in every architecture, that the feature is absent (llama.cpp, llama-hparams.h)."""


class Metadata:
    """Reads the metadata of one architecture, and records which keys were read.

    Its methods raise UserError for a value that has the wrong type, is out of bounds, or is not finite.
    """

    def __init__(self, header: GgufHeader, path: Path, architecture: str):
        self.header, self.path, self.architecture = header, path, architecture
        self._unread = {
            key for key in (*header.values, *header.lengths) if key.startswith(f"{architecture}.")
        }

    def value(self, key: str) -> Any:
        """Return the value as it is in the file, or None; ``key`` is without the architecture's prefix."""
        name = f"{self.architecture}.{key}"
        self._unread.discard(name)
        if name in self.header.lengths and name not in self.header.values:
            raise self.problem(
                f"{name} is a list of strings, or of too many numbers ({self.header.lengths[name]:,} entries)"
            )
        return self.header.values.get(name)

    def peek(self, key: str) -> Any:
        """Return the value as it is in the file, without marking the key as read; None if the file lacks the
        key.
        """
        return self.header.values.get(f"{self.architecture}.{key}")

    def count(self, key: str) -> int | None:
        """Return an integer above zero; None if the key is absent or 0. If the key has a value for each
        layer, all values must be equal.
        """
        value = self.value(key)
        if isinstance(value, tuple) and value:
            if len(set(value)) > 1:
                raise self.problem(
                    f"{self.architecture}.{key} differs between layers, which is not supported", lost=True
                )
            value = value[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
            raise self._invalid(key, value, f"a whole number up to {_MAX_COUNT:,}")
        return value or None

    def number(self, key: str) -> float | None:
        """Return a finite number, or None."""
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._invalid(key, value, "a finite number")
        return shortest(value) if isinstance(value, float) else float(value)

    def positive(self, key: str) -> float | None:
        """Return a finite number above zero; None if it is absent or 0, which stands for a missing value."""
        number = self.number(key)
        if number is not None and number < 0:
            raise self._invalid(key, number, "a number above 0")
        return number or None

    def text(self, key: str) -> str | None:
        """Return a text, or None."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self._invalid(key, value, "a text")
        return value

    def expect(self, key: str, *expected: Any) -> None:
        """Read a key that has no config field, because only the value ``expected[0]`` is supported.

        The other values in ``expected`` mean the same. Raises UserError naming the key for a different value.
        """
        value = self.value(key)
        if value is None or any(is_same(value, each) for each in expected):
            return
        raise self.problem(
            f"{self.architecture}.{key} is {in_words(value)}, but only {in_words(expected[0])} is supported",
            lost=True,
        )

    def has(self, tensor: str) -> bool:
        """Return whether the file has a tensor."""
        return tensor in self.header.tensors

    def has_in_a_layer(self, part: str) -> bool:
        """Return whether any layer has the named tensor: ``attn_q.bias``."""
        return any(name.startswith("blk.") and name.endswith(f".{part}") for name in self.header.tensors)

    def finish(self) -> None:
        """Raise UserError for a key that was not read, unless its value turns a feature off."""
        for name in sorted(self._unread):
            value = self.header.values.get(name)
            if value != 0 or name.removeprefix(f"{self.architecture}.") not in _OFF_AT_ZERO:
                said = f"{len(value):,} values" if isinstance(value, tuple) else in_words(value)
                raise self.problem(f"{name} ({said}) is not understood", lost=True)

    def problem(self, what: str, *, lost: bool = False) -> UserError:
        """Return an error for the file. ``lost``: whether to add that ignoring the value would change the
        model.
        """
        why = (
            "Without this value, training would use a different model than the one in the file."
            if lost
            else ""
        )
        return gguf_problem(self.path, what, why=why)

    def _invalid(self, key: str, value: Any, expected: str) -> UserError:
        return self.problem(f"{self.architecture}.{key} is {in_words(value)}, not {expected}")


def shortest(value: float) -> float:
    """Return the number with the fewest digits that is equal in float32: 1e-05 for 9.99999974e-06."""
    for digits in range(1, 10) if abs(value) < 3e38 else ():
        rounded = float(f"{value:.{digits}g}")
        if struct.pack("<f", rounded) == struct.pack("<f", value):
            return rounded
    return value


def is_same(value: Any, expected: Any) -> bool:
    """Return whether a value of a file equals the expected one, to the precision of float32."""
    both = (value, expected)
    if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in both):
        return math.isclose(value, expected, rel_tol=_TOLERANCE)
    return bool(value == expected) and type(value) is type(expected)


def in_words(value: Any) -> str:
    """Return a value of a file for a message, shortened."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
