"""The Train screen. ``screen`` carries out the commands, and asks before a run is stopped or paused.

The user prepares a run in ``launch_pane``, and watches it in ``live_pane``. ``screen`` polls
``run_follower``, which reads the run's files and returns a snapshot. ``run_panels``, ``outcome``,
``stage_panel``, ``step_charts`` and ``machine_panel`` draw the snapshot.
"""
