"""Model: ``screen`` shows ``listed_models`` (``model_lines``) and one (``model_side``).

``model_facts`` describes it, ``model_fit`` estimates its memory. ``starter_choice`` are models of the Hub to
start with. ``hub_queries`` asks the Hub; ``downloads`` are child processes, which ``download_actions`` starts
and ``download_line`` shows.
"""
