"""The Model screen. ``screen`` shows ``model_list`` and the facts about one model.

``model_list`` lists models on this machine, recommended models, and search results from the Hub;
``model_facts`` describes a model and estimates its memory. ``downloads`` has the processes that download
models, and the panel that shows their progress.
"""
