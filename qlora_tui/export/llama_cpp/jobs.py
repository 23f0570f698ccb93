"""Jobs for llama.cpp and their results. Loads no library."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class ComparedRow(Struct, frozen=True):
    """One conversation, and where its next-token logits are compared."""

    text: str
    """The rendered conversation; empty where its tokens are not compared."""
    ids: tuple[int, ...]
    """Its tokens by our tokenizer."""
    positions: tuple[int, ...]
    """Places in ``ids`` whose logits predict a trained token, ascending."""

    @property
    def computed_ids(self) -> tuple[int, ...]:
        """Return the tokens up to the last position."""
        return self.ids[: self.positions[-1] + 1] if self.positions else ()


class ComparedPrompt(Struct, frozen=True):
    """A conversation and its prompt."""

    turns: tuple[tuple[str, str], ...]
    """Role and content."""
    text: str
    """The prompt as the chat template renders it, without the begin token."""


class Quantize(Struct, frozen=True):
    """Quantize a GGUF file."""

    source: str
    target: str
    file_type: str
    """``Q4_K_M`` and so on."""


class StoredAnswers(Struct, frozen=True, kw_only=True):
    """Files from which the trained model's logits at every compared position are computed again.

    Logits are ``inputs`` times ``matrix`` times ``scale``, and then capped.
    """

    inputs: str
    """File of the output layer's inputs, (positions of all rows, width)."""
    matrix: str
    """File of the output layer's matrix, (width, vocabulary)."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Of both files, the model's own: nothing is rounded."""
    width: int
    vocabulary: int
    scale: float = 1.0
    softcap: float = 0.0
    """Bound c of logits c·tanh(x/c); 0 for none."""

    @property
    def position_bytes(self) -> int:
        """Return the bytes of one position in ``inputs``."""
        return self.width * (4 if self.dtype == "float32" else 2)


class Compare(Struct, frozen=True):
    """Compare a GGUF file's tokens and logits with those of the trained model."""

    model: str
    rows: tuple[ComparedRow, ...]
    reference: StoredAnswers
    end_ids: tuple[int, ...] = ()
    """Tokens that end a turn."""
    prompts: tuple[ComparedPrompt, ...] = ()
    lora: str = ""
    """A LoRA in a GGUF file of its own."""
    exact: bool = False
    """Compute attention in float32 throughout instead of llama.cpp's defaults."""


class Quantized(Struct, frozen=True):
    """A quantized file."""

    bytes: int


class Compared(Struct, frozen=True):
    """What a comparison found. Divergences are of the file from the reference, in nats."""

    template: str
    """The file's chat template."""
    different_tokens: tuple[int, ...]
    """Numbers of the rows whose text llama.cpp splits into other tokens, also as a server's prompt."""
    different_prompts: int | None
    """Number of prompts that llama.cpp's built-in renderer writes otherwise; None if it has none for the
    template."""
    first_tokens: tuple[int, ...]
    """Tokens that llama.cpp puts before every text."""
    overrun_ids: tuple[int, ...]
    """Those of ``end_ids`` at which llama.cpp does not stop."""
    positions: int
    """Number of positions compared."""
    divergence: float
    """Mean KL divergence over the positions."""
    worst: float
    """Largest KL divergence of one position."""
    top1_matches: int
    """Number of positions at which both rank the same token first."""
    turns: int
    """Number of positions at which a turn ends."""
    turns_ended: int
    """Number of these at which the file ranks a turn end first."""
    turns_ended_by_reference: int
