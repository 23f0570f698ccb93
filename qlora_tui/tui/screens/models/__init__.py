"""Model: ``screen`` shows ``model_list`` and the facts of one model.

``model_list`` lists local models, Hub results, and good first models; ``model_facts`` describes a model and
estimates its memory. ``downloads`` has the child processes that download, and the panel that shows them.
"""
