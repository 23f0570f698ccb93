"""Train: ``screen`` has the keys, and asks before a run is stopped or paused.

``launch_pane`` prepares a run, and ``live_pane`` shows one. ``screen`` polls ``run_follower``, which reads
the run's files and returns a snapshot. ``run_panels``, ``step_charts`` and ``machine_panel`` draw the
snapshot.
"""
