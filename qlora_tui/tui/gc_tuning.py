"""When Python collects garbage: not before the first frame, and never again among long-lived objects.

The command line turns it off (``cli/main.py``); where many apps come and go, as in tests, nothing here does
anything.
"""

import gc

_is_tuned = False


def enable_gc() -> None:
    """Enable garbage collection, once the first frame has been sent."""
    global _is_tuned
    if not gc.isenabled():
        _is_tuned = True
        gc.enable()
        gc.freeze()


def freeze_objects() -> None:
    """Exempt all current objects from garbage collection: scanning them would delay a key."""
    if _is_tuned:
        gc.collect()
        gc.freeze()
