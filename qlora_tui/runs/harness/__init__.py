"""Tasks of EleutherAI's lm-evaluation-harness (``lm-eval``), in files of the user.

``harness_task``        reads a task file, and refuses what would run code or needs a network
``harness_keys``        the keys of a task file that are read, and why others are refused
``harness_templates``   refuses templates that could leave jinja2's sandbox
``harness_evaluation``  the file of results, and the results as text
``harness_job``         has the tasks answered by ``chat.harness_worker``, in a process with torch and lm-eval
"""
