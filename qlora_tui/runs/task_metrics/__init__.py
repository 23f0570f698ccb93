"""Quality of a model's answers to validation prompts: the adapter's answers compared with the base's.

``intervals``          confidence intervals of shares, means and paired differences
``answer_metrics``     chooses metrics that suit the reference answers, and compares answers by these metrics
``decisions``          the quality of decisions, and the calibration of their probabilities
``task_evaluation``    the file of an evaluation, the job that writes it, and its report
"""
