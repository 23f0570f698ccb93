"""Memory: ``screen`` has the panels and keys, ``step_panels`` shows the peak of a training step.

``what_fits`` computes and shows the settings that fit, and the changes that make the recipe fit.
"""
