"""Adapters and the weights that they change, read from files. Loads torch, but no model.

deltas          the update of each weight by an adapter
stored_layout   maps tensors of the base's files to parameters of its model, and back
weight_files    the tensors of the base's files, with MXFP4 converted to 16-bit matrices
base_weights    the base's folder and weight files, and the tensor that each update applies to
merged_weights  the base's weights with an adapter merged in, with stored or requantized base weights
"""
