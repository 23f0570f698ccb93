"""Model: ``screen`` (keys: ``commands``) lists models (``model_lines``) beside one of them (``model_side``).

``model_facts`` describes it, ``model_fit`` estimates its memory. ``hub_queries`` asks the Hub; ``downloads``
are child processes, which ``download_actions`` starts and ``download_line`` shows.
"""
