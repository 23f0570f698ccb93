"""Train: ``screen``; ``actions`` is what its keys do.

``launch_pane`` prepares a run: ``settings_form`` over a ``setting_list``, with ``setting_notes`` in a
large window. ``live_pane`` shows one: ``screen`` polls ``run_follower`` every ``RUN_POLL_INTERVAL_S``, which
reads its events and telemetry (``output_tail`` the output of the trainer) and returns a ``run_snapshot``.
``run_header``, ``start_stages`` before the first step, ``loss_graph`` with the ``run_charts``, ``gpu_panel``,
``run_facts``, and ``log_tail`` under its ``log_title`` show it. ``run_picker`` chooses another.
"""
