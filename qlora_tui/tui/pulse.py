"""How things stand: what one look at the machine found, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics
    from qlora_tui.runs.directory import RunDir
    from qlora_tui.runs.news import News
    from qlora_tui.runs.status import Status


@dataclass(frozen=True)
class Pulse:
    """How things stand."""

    looked: bool = False
    """False before the first look: then nothing of the rest is known."""
    card: GpuDevice | None = None
    reading: GpuMetrics | None = None
    no_card: str = ""
    """Why there is no card, in a sentence."""
    active: RunDir | None = None
    """The run in training."""
    active_status: Status | None = None
    last: RunDir | None = None
    """The run at work, else the one that ended last."""
    last_status: Status | None = None
    waiting: tuple[str, ...] = ()
    """Ids in the queue, the next one first."""
    news: tuple[News, ...] = ()
    """Of runs that have ended since the last look."""

    @property
    def free_bytes(self) -> int | None:
        """Memory of the card that nobody holds now; None without a card."""
        used = self.reading.memory_used_bytes if self.reading else None
        return self.usable_bytes - used if self.usable_bytes is not None and used is not None else None

    @property
    def usable_bytes(self) -> int | None:
        """What programs can have of the card; None without a card, or where it does not say."""
        return self.card.usable_bytes if self.card else None
