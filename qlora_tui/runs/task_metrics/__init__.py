"""What a model got right on validation prompts: the adapter's answers compared with the base's.

``intervals``          confidence intervals of shares, means and paired differences
``answer_metrics``     chooses metrics by what the reference answers look like, and compares answers by them
``decisions``          what decisions are worth, and the calibration of their probabilities
``task_evaluation``    the file of an evaluation, the job that writes it, and its report
"""
