"""The methods that learn from better and worse answers, with their requirements.

The losses are in :mod:`qlora_tui.training.preferences`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PreferenceMethod = Literal["orpo", "dpo", "simpo", "kto"]
"""A method to learn from both the better and the worse answers of preference data."""


@dataclass(frozen=True, kw_only=True)
class PreferenceTraits:
    """What a preference method compares, and its requirements."""

    label: str
    """Name of the method, such as ``SimPO``."""
    effect: str
    """Short description of what the model learns, which is shown in lists of methods."""
    default_beta: float
    """The β of the method's paper."""
    rates_answers: bool = False
    """Whether a sample is one answer that is good or bad, instead of a pair of answers."""
    uses_reference: bool = False
    """Whether rewards are relative to a reference, which is the model before training.

    If so, each step also runs a forward pass of the reference, and all rewards start at 0.
    """
    has_margin: bool = False
    """Whether ``training.simpo_gamma`` separates the rewards of a pair."""
    learns_answers: bool = False
    """Whether the method makes the better answers more likely.

    Other methods may learn which answers are better while all become less likely.
    """


PREFERENCE_TRAITS: dict[PreferenceMethod, PreferenceTraits] = {
    "orpo": PreferenceTraits(
        label="ORPO",
        effect="learn the chosen answers and prefer them",
        default_beta=0.1,
        learns_answers=True,
    ),
    "dpo": PreferenceTraits(
        label="DPO",
        effect="prefer the chosen answers, stay close to the base",
        default_beta=0.1,
        uses_reference=True,
    ),
    "simpo": PreferenceTraits(
        label="SimPO",
        effect="like DPO without a reference model: faster steps",
        default_beta=2.0,
        has_margin=True,
    ),
    "kto": PreferenceTraits(
        label="KTO",
        effect="prefer good answers to bad ones, stay close to the base",
        default_beta=0.1,
        rates_answers=True,
        uses_reference=True,
    ),
}
PREFERENCE_METHODS = tuple(PREFERENCE_TRAITS)
PAIR_METHODS = tuple(method for method, traits in PREFERENCE_TRAITS.items() if not traits.rates_answers)
"""Methods that compare a chosen with a rejected answer to the same prompt."""
