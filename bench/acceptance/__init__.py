"""The checks of :mod:`bench.gpu_acceptance`, each in a separate process.

context           what a check works with, and its outcome
check             names and deadlines of the checks, and the program that makes one
probe_checks      single parts on this GPU, such as kernels, NF4 and a full memory
run_checks        the loop from recipe to adapter
memory_checks     the memory estimate
streaming_checks  what waits in host memory
runs              training runs as the app starts them
"""
