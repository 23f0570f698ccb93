"""The trainer: the process that holds torch and the card, for one run.

``python -m qlora_tui.training RUN_DIR`` takes a run from its ``recipe.toml`` to its ``adapter/``.

``__main__``     arguments, and the environment that must stand before torch is imported
``frame``        everything around training: one trainer a run, heartbeat, each error told (``failure``)
``reporter``     writes events, status and log; ``telemetry``: the machine once a second
``run``          the stations of a run, in order: load, prepare, train, save
``device``       what there is to compute on, and in which dtype; ``versions``: with which libraries
``priority``     giving way to other programs, where the processor trains
``base``         the base model with its loss and attention; ``load``: quantized and frozen
``clean_files``  what libraries are shown of a folder: weights, and configs that choose no code;
                 ``kernel_publishers``: whose kernels may be loaded
``conversion``   a GGUF file as a folder of safetensors, made once by the process ``gguf``: ``gguf_weights``
                 writes the tensors of known families, ``llama_gguf`` (with ``vocabulary``) the rest of a
                 plain Llama, ``streamed_gguf`` that of the others
``adapter``      LoRA on top of it; ``lean``: module and adapter as one function; ``token_rows``: rows of
                 embedding and head for tokens that the base never learned
``attention``    several samples in one row, each attending only to itself; ``even``: filled up for a CPU's
                 kernels
``loss``         cross-entropy over the trained tokens only, without the whole logits; ``liger``: its kernel
``checks``       proves both on the model at hand, or falls back (``attention_check``: layer by layer);
                 ``agreement``: when two results are the same
``verify``       the first step against transformers and peft alone (``step_check``); what differs
                 (``fast_paths``) is replaced for the run
``batches``      samples to rows to micro-batches, in an order that resume can repeat
``probe``        one step on the longest batch before the first; ``measure``: the memory a run takes;
                 ``heap``: giving free memory back
``loop``         transformers' ``Trainer``, with what happens at the edge of a step
``edge``         what that is: told, validated (``evaluation``, ``accuracy``), saved (``disk_errors``: what a
             failed write stands for), and what was ``asked``
``checkpoints``  written whole or not at all; resumed exactly
``health``       what is watched for, in steps and on the card
``processes``    one run over several cards
``finish``       the adapter folder
``selftest``     does training work here: for ``qlora-tui doctor``

``__main__``, ``frame`` and what they import load no torch: the run shows as started while that takes its
seconds.
"""
