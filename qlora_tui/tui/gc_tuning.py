"""When Python looks for garbage: not before the first frame, and never again among what is there to stay.

The command line turns it off (``cli/main.py``); where many apps come and go, as in tests, nothing here does
anything.
"""

import gc


def enable_gc() -> None:
    """The first frame is on its way: from now on there may be garbage worth looking for."""
    if not gc.isenabled():
        gc.enable()
        gc.freeze()


def freeze_objects() -> None:
    """Take what is there by now as there to stay: a look for garbage among all of it holds up a key."""
    if gc.get_freeze_count():
        gc.collect()
        gc.freeze()
