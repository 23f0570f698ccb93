"""Frozen decoder layers that are kept in host memory and copied in turn to two buffers of the device.

A base model that is larger than the GPU's memory can be trained, because the GPU holds only two of its layers
at a time, in addition to embeddings, norms, head, adapters and optimizer. Each layer is copied while the
previous one computes, in forward and backward.

``slots``          the tensors of a layer that move, and the two device buffers that they are copied to
``placement``      places a loaded model, and makes its layers wait for their weights
``input_offload``  keeps inputs of checkpointed layers in host memory between forward and backward
``host_memory``    allocates host memory, pinned if possible; checks and measures it
"""
