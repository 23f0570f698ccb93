"""The card: what it is, what it does this second, and why there is none.

``metrics``          facts as msgspec structs: ``GpuDevice``, ``GpuMetrics``, ``GpuProcess``
``errors``           ``GpuUnavailableError``, raised when no GPU can be read, with its reason
``nvml``             ``list_gpus()`` and ``Nvml``: the driver, queried through NVML
``visible_devices``  which of the GPUs torch will use: CUDA_VISIBLE_DEVICES
``metrics_sampler``  ``MetricsSampler``: a thread that reads a GPU every second
``torch_env``        environment variables and warning filters to set before torch is imported

Importing any of these loads no driver and no ``pynvml`` (45 ms); that happens on first use.
"""
