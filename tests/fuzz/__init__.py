"""Every parser of a file of others, fed damage: hypothesis on a corpus, the same cases on each run.

``FUZZ_EXAMPLES`` is how many damaged files each parser gets (30 unless set); a nightly run sets thousands.
"""
