"""Train: ``screen`` and its ``commands``; ``actions`` is what its keys do.

``launch_pane`` prepares a run: ``settings_form`` over a ``setting_list``. ``live_pane`` watches one:
``run_follower`` reads its files (``output_tail`` the output of the trainer); ``run_header``, ``run_charts``,
``sparklines``, ``gpu_panel``, and ``log_tail`` under a ``tab_bar`` show it. ``run_picker`` chooses another.
"""
