"""The ways to fine-tune that are compared, each a program of its own.

``python -m bench.ways.WAY WORK.json`` trains once over the rows of a :class:`~bench.ways.work.Work` and
leaves an adapter; what it prints on the way is in :mod:`.work`. :mod:`.usual`,
:mod:`.plain` and :mod:`.trl_packed` use nothing of the project's, so that they run in the environment their
users would have.
"""
