"""Train: ``screen``, whose ``launch_pane`` prepares a run and whose ``live_pane`` shows one.

``screen`` polls ``run_follower``, which reads the files of the run and returns a snapshot; ``run_panels`` and
``charts`` draw it, ``machine_panel`` its GPU and processor.
"""
