"""Which card torch will use, worked out without torch.

The trainer and every other process that loads torch must run with ``STABLE_ORDER`` in its environment:
by default CUDA numbers the fastest card first, and then its 0 need not be the 0 of NVML.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from qlora_tui.gpu.no_gpu import NoGpu, Reason
from qlora_tui.gpu.nvml import cards
from qlora_tui.gpu.reading import Card

STABLE_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Environment that makes CUDA number the cards as NVML and ``nvidia-smi`` do."""

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def torch_card(environ: Mapping[str, str] = os.environ) -> Card:
    """The card that is ``cuda:0`` to torch. Raises ``NoGpu``."""
    visible = torch_cards(cards(), environ)
    if not visible:
        raise NoGpu(Reason.HIDDEN, f'It is set to "{environ[_VARIABLE]}".')
    return visible[0]


def torch_cards(found: Sequence[Card], environ: Mapping[str, str] = os.environ) -> list[Card]:
    """``found`` as torch numbers them: the first is ``cuda:0``. Empty when all are hidden.

    CUDA's rules (CUDA Programming Guide, "CUDA Environment Variables"): indices or UUIDs, which may be cut
    short while they stay unique; the first entry that names no card ends the list. As in
    ``torch/cuda/__init__.py`` a card named twice hides them all.
    """
    value = environ.get(_VARIABLE)
    if value is None:
        return list(found)
    visible: list[Card] = []
    for entry in value.split(","):
        card = _named(entry.strip(), found)
        if card is None:
            break
        if card in visible:
            return []
        visible.append(card)
    return visible


def _named(entry: str, found: Sequence[Card]) -> Card | None:
    if entry.startswith("GPU-"):
        matches = [card for card in found if card.uuid is not None and card.uuid.startswith(entry)]
    else:
        matches = [card for card in found if entry == str(card.index)]
    return matches[0] if len(matches) == 1 else None
