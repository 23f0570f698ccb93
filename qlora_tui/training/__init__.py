"""The trainer: the process that holds torch and the card, for one run.

``python -m qlora_tui.training RUN_DIR`` takes a run from its ``recipe.toml`` to its ``adapter/``.

``__main__``     arguments, and the environment that must stand before torch is imported
``frame``        everything around training: one trainer a run, heartbeat, and each error told as an event
``reporter``     writes events, status and log
``run``          the stations of a run, in order: load, prepare, train, save
``device``       what there is to compute on, and in which dtype
``load``         the base model, quantised and frozen
``adapter``      LoRA on top of it
``attention``    several samples in one row, each attending only to itself
``loss``         cross-entropy over the trained tokens only, without the whole logits
``checks``       proves both on the model at hand, or falls back
``batches``      samples to rows to micro-batches, in an order that resume can repeat
``loop``         transformers' ``Trainer``, with what happens at the edge of a step
``checkpoints``  written whole or not at all; resumed exactly
``health``       what is watched for, in steps and on the card
``processes``    one run over several cards
``finish``       the adapter folder

``__main__``, ``frame`` and what they import load no torch: the run shows as started while that takes its
seconds.
"""
