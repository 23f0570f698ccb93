"""Model: ``screen`` (keys: ``commands``) lists models (``model_lines``) and describes one (``model_facts``).

``hub_queries`` asks the Hub; ``downloads`` are child processes, ``download_line`` shows them.
"""
