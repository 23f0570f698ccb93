"""When Python collects garbage: not before the first frame, and never again among long-lived objects.

The command line turns it off (``cli/main.py``); where many apps come and go, as in tests, nothing here does
anything.
"""

import gc


def enable_gc() -> None:
    """Enable garbage collection, once the first frame has been sent."""
    if not gc.isenabled():
        gc.enable()
        gc.freeze()


def freeze_objects() -> None:
    """Exempt all current objects from garbage collection: scanning them would delay a key."""
    if gc.get_freeze_count():
        gc.collect()
        gc.freeze()
