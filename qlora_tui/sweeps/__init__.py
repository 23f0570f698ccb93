"""Sweeps: many runs of one recipe with other settings, and whether the best of them is better than chance.

sheet       a recipe with a table ``[sweep]``, and whether it can be run so
space       which settings are varied, over which values; grid and random points
directory   a sweep's folder, and the record of what was decided
view        a sweep as its folder and its runs say: for screens and commands
describe    its state and verdict in words, its trials as a table, what each setting bought
plan        what fits in a time, what a round keeps, and the verdict on the winner
study       the trials as an Optuna study: TPE and importances (optional)
driver      decides what is next, and queues it; called by the runner
actions     start, pause, resume, stop, add time, adopt

The trials are ordinary runs of the queue.
"""
