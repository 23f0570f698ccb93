"""Programs that fine-tune the same rows, to compare: ours and three baselines.

``python -m bench.baselines.PROGRAM JOB.json`` trains once over the rows of a
:class:`~bench.baselines.job.TrainingJob` and leaves an adapter; :mod:`.job` has the lines that it prints.
:mod:`.hf_trainer`, :mod:`.step_by_step` and :mod:`.trl_trainer` use nothing of the project's, so that they
run in the environment their users would have; :mod:`.qlora_tui_run` is the program itself.
"""
