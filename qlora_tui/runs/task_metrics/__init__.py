"""What a model got right on validation prompts: the answers of the base beside those of the adapter.

``intervals``          confidence intervals of shares, means and paired differences
``answer_texts``       compares an answer with the reference: words, labels, JSON
``tool_call_texts``    reads tool calls from an answer and compares them with the tools that were offered
``answer_metrics``     chooses metrics by what the reference answers look like, and computes them
``task_evaluation``    the file of an evaluation, and the sentences on it
``task_report``        the report as text
"""
