"""The Memory screen. ``screen`` has its panels and commands, ``step_panels`` draws the peak of a training
step and its items, and ``timeline`` draws the memory over the course of the step.

``what_fits`` computes which settings fit and which changes make the recipe fit, and shows the changes;
``settings_table`` shows the settings.
"""
