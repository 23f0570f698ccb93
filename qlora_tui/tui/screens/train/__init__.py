"""Train: ``screen`` has the keys, and asks before a run is stopped or paused.

Its ``launch_pane`` prepares a run, and its ``live_pane`` shows one. ``screen`` polls ``run_follower``, which
reads the files of the run and returns a snapshot; ``run_panels`` and ``step_charts`` draw it,
``machine_panel`` its GPU and processor.
"""
