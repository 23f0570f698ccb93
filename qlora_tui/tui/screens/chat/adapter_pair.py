"""Which adapters answer: two side by side, or one of the two."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tui.chat.chat_types import BASE


@dataclass(frozen=True)
class AdapterPair:
    """The left and the right adapter, among all adapters of a run. The base model counts as one."""

    adapter_names: tuple[str, ...]
    left: str
    right: str
    shown: str = "both"
    """``both``, ``left`` or ``right``."""

    @classmethod
    def of(cls, adapter_names: tuple[str, ...]) -> AdapterPair:
        """The base beside the newest adapter; the base alone where there is no adapter."""
        adapters = [adapter_name for adapter_name in adapter_names if adapter_name != BASE]
        return cls(adapter_names, BASE, adapters[0]) if adapters else cls(adapter_names, BASE, BASE, "left")

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that answer the next prompt."""
        both = (self.left, self.right)
        return {"both": both, "left": both[:1], "right": both[1:]}[self.shown]

    @property
    def single(self) -> bool:
        """Whether there is only one adapter."""
        return self.left == self.right

    def split(self) -> AdapterPair:
        """Toggle between both and the right one alone."""
        if self.single:
            return self
        return replace(self, shown="right" if self.shown == "both" else "both")

    def switched(self) -> AdapterPair:
        """Show one alone: the right one, or the left one if the right one is alone already."""
        if self.single:
            return self
        return replace(self, shown="left" if self.shown == "right" else "right")

    def next(self, side: str) -> AdapterPair:
        """Select the next adapter on one side, skipping the one on the other side."""
        own, other = (self.left, self.right) if side == "left" else (self.right, self.left)
        free = [adapter_name for adapter_name in self.adapter_names if adapter_name != other]
        if len(free) < 2:
            return self
        following = free[(free.index(own) + 1) % len(free)]
        return replace(self, left=following) if side == "left" else replace(self, right=following)
