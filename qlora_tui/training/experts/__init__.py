"""Mixtures of experts: 4-bit weights and LoRA for parameters that each hold all experts of a layer.

:mod:`.storage`: stacks of 4-bit matrices, written and read one expert at a time; MXFP4
:mod:`.routing`: the module that replaces a family's experts, with its forward and backward
:mod:`.lora`: LoRA on experts, and the family's code as the reference
:mod:`.loading`: quantizes experts while transformers reads them
"""
