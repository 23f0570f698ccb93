"""The GPU: its properties, its current metrics, and errors when it cannot be read.

``metrics``          facts as msgspec structs: ``GpuDevice``, ``GpuMetrics``, ``GpuProcess``
``errors``           ``GpuUnavailableError``, raised when no GPU can be read, with its reason
``driver``           ``open_driver()`` and ``list_gpus()``: what the rest of the program reads GPUs through
``nvml``             ``Nvml``: the driver of NVIDIA GPUs, the only one supported
``visible_devices``  which GPU torch will use, of several: the user's choice, or the one with the most memory
``torch_on_gpu``     whether the installed torch can use it, and if not, why and what to install
``cuda_errors``      errors of CUDA that the user can do something about
``metrics_sampler``  ``MetricsSampler``: a thread that reads a GPU every second
``wsl``              whether this is WSL2, and what is unsafe there
``torch_env``        environment variables and warning filters to set before torch is imported
``library_imports``  ``faster_imports()``, around imports of torch and the libraries on it

Importing these modules loads neither the driver nor ``pynvml`` (45 ms); that happens on first use.
"""
