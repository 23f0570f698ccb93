"""Compares every shortcut with the library's own computation, on the loaded model, before it is used.

:mod:`.rounding`: whether two tensors differ only by rounding, and how much rounding changes a whole model
:mod:`.base`: the output head and packed attention of a loaded base; :mod:`.attention`: attention by layer
:mod:`.step_comparison`: a whole step by the library, its rounding noise, and how far our step differs from it
:mod:`.first_step`: the first step of a run with all fast paths; switches off those whose results differ
"""
