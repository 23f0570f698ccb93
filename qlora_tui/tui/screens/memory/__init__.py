"""The Memory screen. ``screen`` has its panels and commands, ``step_panels`` draws the memory of a training
step.

``what_fits`` computes and shows which settings fit, and which changes make the recipe fit.
"""
