"""Measurements: each script prints figures beside a named baseline; with ``--json`` as data."""
