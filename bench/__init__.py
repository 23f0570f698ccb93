"""Measurements: each script prints figures next to a named baseline; with ``--json``, as data."""
