"""The GPU: its properties, its current metrics, and errors if it cannot be read.

``metrics``          properties and metrics as msgspec structs: ``GpuDevice``, ``GpuMetrics``, ``GpuProcess``
``errors``           ``GpuUnavailableError``, which is raised with its reason if no GPU can be read
``nvml``             ``Nvml``, which reads GPUs from NVIDIA's driver; ``MetricsSampler``, which does so in a
                     thread
``visible_devices``  the GPU that torch will use: the user's choice, or the one with the most memory
``torch_on_gpu``     whether the installed torch can use a GPU, and if not, why and what to install
``cuda_errors``      CUDA errors that the user can do something about, among them those for lack of memory
``torch_env``        environment variables to set before torch is imported; WSL2; ``faster_imports()``

Importing these modules loads neither the driver nor ``pynvml`` (45 ms); both are loaded at their first use.
"""
