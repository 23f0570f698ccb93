"""Frozen decoder layers that wait in host memory and pass through two buffers of the device in turn.

A base model that is larger than the GPU can be trained, because only two layers of it are there at a time,
next to what stays: embeddings, norms, head, adapters and optimizer. Each layer is copied in while the one
before it computes, forward and backward.

``slots``          which tensors of a layer move, and the two buffers of the device through which they pass
``placement``      places a loaded model, and makes its layers wait for their weights
``input_offload``  the inputs of checkpointed layers, in host memory between forward and backward
``host_memory``    pinned if the system allows it; whether there is enough, and how fast it is
"""
