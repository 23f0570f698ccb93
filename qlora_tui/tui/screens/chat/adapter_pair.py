"""Which voices are spoken to: two beside each other, or one of the two alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tui.chat.chat_types import BASE


@dataclass(frozen=True)
class AdapterPair:
    """A left voice and a right one, out of those there are."""

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
        """Who answers the next prompt."""
        both = (self.left, self.right)
        return {"both": both, "left": both[:1], "right": both[1:]}[self.shown]

    @property
    def single(self) -> bool:
        """There is only one voice."""
        return self.left == self.right

    def split(self) -> AdapterPair:
        """Both, or the right one alone."""
        if self.single:
            return self
        return replace(self, shown="right" if self.shown == "both" else "both")

    def switched(self) -> AdapterPair:
        """One alone: the right one, or, if it is alone already, the left one."""
        if self.single:
            return self
        return replace(self, shown="left" if self.shown == "right" else "right")

    def next(self, side: str) -> AdapterPair:
        """Another voice on one side: the next that is not on the other."""
        own, other = (self.left, self.right) if side == "left" else (self.right, self.left)
        free = [adapter_name for adapter_name in self.adapter_names if adapter_name != other]
        if len(free) < 2:
            return self
        following = free[(free.index(own) + 1) % len(free)]
        return replace(self, left=following) if side == "left" else replace(self, right=following)
