"""Programs that fine-tune the same rows, for comparison: this program and three baselines.

``python -m bench.baselines.PROGRAM JOB.json`` trains once over the rows of a
:class:`~bench.baselines.job.TrainingJob`, and leaves an adapter. :mod:`.job` describes the lines that it
prints. :mod:`.hf_trainer`, :mod:`.step_by_step` and :mod:`.trl_trainer` use nothing of this project, so that
they run in their users' environments. :mod:`.qlora_tui_run` is this program.
"""
