"""Train: ``screen``, whose ``launch_pane`` prepares a run and whose ``live_pane`` shows one.

``screen`` polls ``run_follower``, which reads the files of the run and returns a snapshot; ``run_panels``,
``run_graph``, ``gpu_panel`` and ``log_tail`` draw it.
"""
