"""The trainer: the process that holds torch and the GPU for one run.

``python -m qlora_tui.training RUN_DIR`` takes a run from its ``recipe.toml`` to its ``adapter/``. The road,
in the order in which it is traveled:

``__main__``         arguments, and the environment that must be set before torch is imported
``supervisor``       one trainer per run, and an event for every end; resumes from the newest checkpoint
``attempt``          one attempt at a run: set up, train, finish
``setup``            loads data, model and adapter, plans all steps, verifies the first; fills the ``run``
``model``            the base: loaded, quantized, frozen, with the loss and attention that were verified on it
``model_class``      which class of transformers loads a config, and a model of it without weights;
                     ``description``: its architecture, from that model; ``direct_reads``: weights that
                     its code reads itself, which stay in 16 bits
``adapter``          adds LoRA; reads and writes its weights, and the final folder
``samples``          tokenized samples in memory
``batches``          the sequences of a step, planned in ``data.step_plan``, as micro-batches of tensors
``checks``           comparisons of every shortcut with the libraries, before it is used
``loop``             all steps; between them: report, evaluate, save, carry out requests
``rest``             waits between two micro-batches while the GPU is above the bounds of the user
``trainer``          one optimizer step, and the state that a checkpoint holds
``checkpoints``      their folders: written completely or not at all, verified, pruned

What the model computes with:

``loss``             cross-entropy through the head in chunks, summed or for each token; ``liger``: its kernel
``packed_attention`` several samples in one sequence, each attending only to itself; ``length_scaled_rope``:
                     rotary frequencies of each sample's own length
``fused``            norms, rotary positions, MLPs and adapted layers as autograd functions
``embeddings``       trained rows of embedding and head, or both in whole; NEFTune
``experts``          4-bit experts of a mixture, and LoRA on them
``streaming``        frozen layers that wait in host memory and pass through the device
``preferences``      training on pairs of answers, or on rated ones
``optimizers``       which, LoRA+, and the learning rate of each step

What is measured on the way:

``evaluation``       validation, and what training changed of it; ``scoring``: losses and logits of samples
``task_prompts``     prompts of validation rows, with their references
``answers``          greedy ones; ``answer_comparison``: of base and adapter to validation prompts
``decisions``        answers that are one of a few options, and what models decide on validation rows
``option_scores``    log probabilities of all options in one forward; ``calibration``: temperature and bias
``forgetting``       how far the model has moved from its base; ``replay``: the base's answers as samples
``row_losses``       loss of each training row, before and after a run
``health``           what goes wrong in a step or on the GPU: warnings, and the NaN that ends a run
``quantization_quality``  what quantizing changes in the base's predictions, a layer in memory at a time
``memory_meter``     peak memory next to its estimate

Around it:

``reporter``         writes events, status, log and telemetry; ``tracker``: sends events elsewhere
``control_requests`` files in ``control/``, and signals
``distributed``      one run on several GPUs; ``all_reduce``: whether they can exchange gradients
``failures``         the event of an error, and the cause of a failed write
``compute_device``   the GPU or CPU, its dtype and attention; ``host``: memory and priority of the process
``clean_files``      the files of a folder that libraries may read; ``quantized_cache``: earlier weights
``gguf_conversion``  converts a GGUF file once, in a process: ``gguf_weights``, ``gguf_tokenizer``
``library_names``    what is needed of transformers, peft, accelerate and bitsandbytes
``probe``            three steps of a recipe before its launch, with nothing written
``selftest``         trains a random model of two layers for ``qlora-tui doctor``

``__main__``, ``supervisor`` and what they import load no torch, so the run shows as started at once.
"""
