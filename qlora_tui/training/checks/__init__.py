"""Every shortcut is compared with the library's own computation, on the model at hand, before it is used.

:mod:`.rounding`: whether two tensors differ by rounding alone, and how far rounding moves a whole model
:mod:`.base`: the output head and packed attention of a loaded base; :mod:`.attention`: layer by layer
:mod:`.step_comparison`: a whole training step by the library, its rounding noise, and how far ours is from it
:mod:`.first_step`: the first step of a run, with all fast paths; those that differ are switched off
"""
