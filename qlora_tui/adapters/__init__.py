"""Adapters and the weights that they change, read from files; loads torch, and no model.

deltas          the update of each weight by an adapter
stored_layout   which tensors of the base's files are which parameters of its model, and back
weight_files    the tensors of the base's files, those in MXFP4 as 16-bit matrices
base_weights    the base's folder and weight files, and the tensor that each update applies to
merged_weights  the base's weights with an adapter merged in, on the stored base or rounded as in training
"""
