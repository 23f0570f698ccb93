"""The card: what it is, what it does this second, and why there is none.

``reading``  facts as msgspec structs: ``Card``, ``Reading``, ``GpuProcess``
``no_gpu``   ``NoGpu``, the one outcome when the card cannot be asked, with its ``Reason``
``nvml``     ``cards()`` and ``Nvml``: the driver asked through NVML
``visible``  which of the cards torch will use: CUDA_VISIBLE_DEVICES
``sampler``  ``Sampler``: a thread that takes a reading each second
``before_torch``  what must be settled in a process before it loads torch

Importing any of these loads no driver and no ``pynvml`` (45 ms); that happens on first use.
"""
