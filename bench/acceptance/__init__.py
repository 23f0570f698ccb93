"""The checks of :mod:`bench.gpu_acceptance`, each in a separate process.

context        what a check works with, and its outcome
runs           training runs as the app starts them
run_checks     checks of the loop from recipe to adapter
memory_checks  checks of the memory estimate
registry       names and deadlines of the checks
check          the program that makes one
machine        the program that describes GPU, driver and versions
"""
