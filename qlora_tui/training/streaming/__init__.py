"""Frozen decoder layers that wait in host memory and pass through two buffers of the device in turn.

A base model that is larger than the GPU can be trained, because only two layers of it are there at a time,
next to what stays: embeddings, norms, head, adapters and optimizer. Each layer is copied in while the one
before it computes, forward and backward.

``frozen_tensors``    which tensors of a layer move: weights and quantization scales
``host_layer``        the tensors of one layer, side by side in one buffer of host memory
``host_memory``       that buffer, pinned where the system allows it, and whether there is enough
``copy_devices``      copies and events of a GPU, and their equivalent on a CPU
``layer_slots``       the two buffers: which layer is in which, and when the next is copied
``layer_entry``       makes a layer of the model wait for its weights, in forward and backward
``input_offload``     the inputs of checkpointed layers, in host memory between forward and backward
``speed_measurement`` how fast a GPU gets layers and computes with them, for ``doctor``
``placement``         places a loaded model: some layers in host memory, the rest on the device
"""
