"""The Train screen. ``screen`` carries out the commands, and asks before a run is stopped or paused.

In ``launch_pane``, a run is prepared; in ``live_pane``, a run is watched. ``screen`` polls ``run_follower``,
which reads the run's files and returns a snapshot. ``run_panels``, ``outcome``, ``stage_panel``,
``step_charts`` and ``machine_panel`` draw the snapshot.
"""
