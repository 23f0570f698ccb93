"""Sweeps: runs of one recipe with varied settings, and whether the best of them leads by more than chance.

sheet       a recipe with a table ``[sweep]``, and whether it can be run as a sweep
space       which settings are varied, over which values; grid and random points
directory   a sweep's folder, and the record of its decisions
view        the state of a sweep, read from its folder and its runs, for screens and commands
describe    a sweep's state and verdict in words, its trials as a table, the effect of each setting
plan        how many trials fit in a time, which trials a round keeps, and the verdict on the winner
study       the trials as an Optuna study: TPE and importances (optional)
driver      decides the next step and queues its runs; called by the runner
actions     start, pause, resume, stop, add time, adopt

The trials are ordinary runs of the queue.
"""
