"""Model: ``screen`` shows ``model_list`` and the facts of one model.

``model_list`` lists models of this machine, results of the Hub, and models to start with; ``model_facts``
describes one and estimates its memory. ``downloads`` are child processes, with the panel that shows them.
"""
