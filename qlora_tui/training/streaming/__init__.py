"""Frozen decoder layers that are kept in host memory and copied in turn to two buffers of the device.

A base model that is larger than the GPU's memory can be trained, because the GPU holds only two of its layers
at a time, in addition to embeddings, norms, head, adapters and optimizer. Each layer is copied while the
previous one computes, in forward and backward.

``slots`` which tensors of a layer move, and the two buffers of the device through which they pass
``placement`` places a loaded model, and makes its layers wait for their weights ``input_offload`` the inputs
of checkpointed layers, in host memory between forward and backward ``host_memory`` pinned if the system
allows it; whether there is enough, and how fast it is
"""
