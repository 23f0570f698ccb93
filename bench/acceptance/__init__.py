"""The checks of :mod:`bench.gpu_acceptance`, each in a separate process.

context           the input of a check, and its outcome
check             names and deadlines of the checks, and the program that runs one
probe_checks      single parts on this GPU, such as kernels, NF4 and a full memory
run_checks        the loop from recipe to adapter
memory_checks     the memory estimate
streaming_checks  weights and inputs in host memory
runs              training runs as the app starts them
"""
