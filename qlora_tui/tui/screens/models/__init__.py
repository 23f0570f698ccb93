"""Model: ``screen`` (keys: ``commands``) lists models (``model_lines``) and describes one (``model_facts``).

``hub_queries`` asks the Hub; ``downloads`` are child processes, which ``download_actions`` starts and
``download_line`` shows.
"""
