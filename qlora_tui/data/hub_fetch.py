"""The child process that loads a Hub dataset: ``python -m qlora_tui.data.hub_fetch ID[:SUBSET]``.

Prints one JSON object: ``HubFiles``, or ``HubFailure`` with exit code 1. ``trust_remote_code`` is never set,
so the library rejects a dataset that is a script.
"""

from __future__ import annotations

import sys

import msgspec

from qlora_tui.data.hub_dataset import TRAINING_SPLITS, HubFailure, HubFiles


def main(name: str) -> int:
    """Load the training split and print where its Arrow files are."""
    import datasets

    path, _, subset = name.partition(":")
    try:
        names = datasets.get_dataset_split_names(path, subset or None)
        split = next((s for s in TRAINING_SPLITS if s in names), names[0])
        loaded = datasets.load_dataset(path, subset or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, from its own to its HTTP client's
        _tell(_failure(error))
        return 1
    _tell(HubFiles(tuple(file["filename"] for file in loaded.cache_files), split))
    return 0


def _failure(error: Exception) -> HubFailure:
    text = " ".join(str(error).split()) or type(error).__name__
    kind = type(error).__name__
    if "Missing config name" in text:
        return HubFailure(text[:400], "Add the subset after a colon: owner/name:subset.")
    if "Gated" in kind or "401" in text or "403" in text or "gated" in text:
        return HubFailure(text[:400], "Accept its terms on its page, then log in: hf auth login.")
    if "script" in text:
        return HubFailure(
            text[:400], "Dataset scripts are never run. Download the data files and use their paths."
        )
    return HubFailure(text[:400], "Check the name and the connection.")


def _tell(what: HubFiles | HubFailure) -> None:
    print(msgspec.json.encode(what).decode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
