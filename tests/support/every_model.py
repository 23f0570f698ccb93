"""Whether tests that walk over models take all of them, or those of unlike structure."""

from __future__ import annotations

import os

EVERY_MODEL = "EVERY_MODEL" in os.environ
"""Set by ``make check-every-model``. Models that are left out otherwise have no rule of their own."""
