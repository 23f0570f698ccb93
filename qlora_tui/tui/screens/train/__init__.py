"""Train: ``screen`` and its ``commands``.

``launch_pane`` prepares a run. ``live_pane`` watches one: ``run_follower`` reads its files (``output_tail``
the output of the trainer), ``run_header`` and ``loss_plot`` show it. ``run_picker`` chooses another run.
"""
