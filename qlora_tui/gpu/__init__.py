"""The GPU: its properties, its current metrics, and errors if it cannot be read.

``metrics`` facts as msgspec structs: ``GpuDevice``, ``GpuMetrics``, ``GpuProcess`` ``errors``
``GpuUnavailableError``, raised when no GPU can be read, with its reason ``nvml`` ``Nvml``, which reads them
from NVIDIA's driver; ``MetricsSampler``, a thread of it ``visible_devices`` which GPU torch will use, of
several: the user's choice, or the one with the most memory ``torch_on_gpu`` whether the installed torch can
use it, and if not, why and what to install ``cuda_errors`` errors of CUDA that the user can do something
about, and which of them mean no memory ``torch_env`` what to set before torch is imported, and
``faster_imports()`` of it; what WSL2 rules out

Importing these modules loads neither the driver nor ``pynvml`` (45 ms); that happens on first use.
"""
