"""The Memory screen. ``screen`` has its panels and commands, ``step_panels`` draws the peak of a training
step and its items, and ``timeline`` draws the memory over the course of the step.

``what_fits`` computes and shows which settings fit, and which changes make the recipe fit.
"""
