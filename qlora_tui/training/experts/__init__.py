"""Mixtures of experts: 4-bit weights, and LoRA, for parameters that hold all experts of a layer.

:mod:`.expert_storage`: stacks of 4-bit matrices, written and read one expert at a time
:mod:`.experts_4bit`: the module that takes the place of a family's experts
:mod:`.routed_function`: forward and backward of the experts that tokens are routed to, one at a time
:mod:`.expert_lora`: LoRA on experts; :mod:`.expert_reference`: the family's code as the reference
:mod:`.expert_loading`: quantizes experts while transformers reads them
:mod:`.mxfp4`: the format in which gpt-oss stores its experts
"""
