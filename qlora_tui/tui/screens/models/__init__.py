"""The Model screen. ``screen`` shows ``model_list`` and the facts about one model.

``model_list`` lists models of this machine, recommended models, and results of the Hub; ``model_facts``
describes a model and estimates its memory. ``downloads`` has the processes that download, and the panel that
shows their progress.
"""
