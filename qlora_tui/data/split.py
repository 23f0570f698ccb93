"""Which rows are held back to validate on: seeded, the same share of each source, duplicates together."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable

import msgspec

from qlora_tui.data.conversation import Conversation

_encode = msgspec.json.Encoder().encode


def group_key(conversation: Conversation, seed: int) -> int:
    """64 bits that are the same for rows that say the same, whatever case and white space they use.

    The seed is mixed in, so that the order of the keys is the random order of the split.
    """
    words: list[str] = [conversation.text]
    for message in conversation.messages:
        words += [message.role, message.content, message.reasoning]
        if message.tool_calls:
            words.append(_encode([(c.name, c.arguments) for c in message.tool_calls]).decode())
    text = " ".join("\x1f".join(words).lower().split())
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def held_back(keys: array[int], sources: Iterable[int], fraction: float) -> frozenset[int]:
    """The keys of the rows to validate on, about ``fraction`` of the rows of each source.

    ``keys`` and ``sources`` have one entry a row. At least one row is held back where there are two
    different ones, and at least one is left to train on.
    """
    if fraction <= 0:
        return frozenset()
    by_source: dict[int, array[int]] = {}
    for key, source in zip(keys, sources, strict=True):
        by_source.setdefault(source, array("Q")).append(key)
    chosen: set[int] = set()
    for unordered in by_source.values():
        source_keys = sorted(unordered)
        wanted = round(fraction * len(source_keys))
        at = 0
        while at < wanted:
            chosen.add(source_keys[at])
            at = bisect_right(source_keys, source_keys[at])
    smallest, largest = min(keys), max(keys)
    if not chosen and smallest != largest:
        chosen = {smallest}
    if all(key in chosen for key in keys):
        chosen.discard(largest)
    return frozenset(chosen)
