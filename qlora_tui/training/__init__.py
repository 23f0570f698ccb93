"""The trainer: the process that holds torch and the GPU for one run.

``python -m qlora_tui.training RUN_DIR`` turns a run's ``recipe.toml`` into its ``adapter/``. These
modules do it, in this order:

``__main__``         arguments, and the environment that must be set before torch is imported
``supervisor``       one trainer per run, and an event for every end; resumes from the newest checkpoint
``attempt``          one attempt at a run: set up, train, finish
``setup``            loads data, model and adapter, plans all steps, verifies the first; sets up ``run``
``model``            the base: loaded, quantized, frozen, with the loss and attention that were verified on it
``model_class``      the transformers class for a config, and a model of that class without weights;
                     ``description``: the architecture of that model; ``direct_reads``: weights that
                     its code reads directly, which stay in 16 bits
``adapter``          adds LoRA; reads and writes its weights, and the final folder
``samples``          tokenized samples in memory
``batches``          the sequences of a step, planned in ``data.step_plan``, as micro-batches of tensors
``checks``           comparisons of every shortcut with the libraries, before it is used
``loop``             all steps; between steps: report, evaluate, save, carry out requests
``rest``             waits between two micro-batches while the GPU exceeds the user's bounds
``trainer``          one optimizer step, and the state that a checkpoint holds
``checkpoints``      checkpoint folders: written completely or not at all, verified, pruned

Computation of the model:

``loss``             cross-entropy through the head in chunks, summed or per token; ``liger``: Liger's kernel
``packed_attention`` several samples in one sequence, each attending only to itself; ``length_scaled_rope``:
                     rotary frequencies of each sample's own length
``fused``            norms, rotary positions, MLPs and adapted layers as autograd functions
``embeddings``       trained embedding and head, or some of their rows; NEFTune
``experts``          4-bit experts of a mixture, and LoRA on them
``streaming``        frozen layers that are kept in host memory and copied to the device in turn
``preferences``      training on pairs of answers, or on rated ones
``optimizers``       the choice of optimizer, LoRA+, and the learning rate of each step

Measurements:

``evaluation``       validation, and its change by training; ``scoring``: losses and logits of samples
``task_prompts``     prompts of validation rows, with their references
``answers``          greedy answers; ``answer_comparison``: answers of base and adapter to validation prompts
``decisions``        answers that are one of a few options, and what models decide on validation rows
``option_scores``    log probabilities of all options in one forward; ``calibration``: temperature and bias
``forgetting``       how far the model has moved from its base; ``replay``: the base's answers as samples
``row_losses``       loss of each training row, before and after a run
``health``           problems of a step or a GPU: warnings, and the NaN that ends a run
``quantization_quality``  how quantization changes the base's predictions, with one layer in memory at a time
``memory_meter``     peak memory compared with its estimate

Surroundings:

``reporter``         writes events, status, log and telemetry; ``tracker``: sends events elsewhere
``control_requests`` files in ``control/``, and signals
``distributed``      one run on several GPUs; ``all_reduce``: tests whether they can exchange gradients
``failures``         the event that reports an error, and the cause of a failed write
``compute_device``   the GPU or CPU, its dtype and attention; ``host``: memory and priority of the process
``clean_files``      folders in which libraries see only safe files; ``quantized_cache``: stored weights
``gguf_conversion``  converts a GGUF file once, in a separate process: ``gguf_weights``, ``gguf_tokenizer``
``library_names``    the private names of transformers, peft, accelerate and bitsandbytes that are used
``probe``            three steps of a recipe before its launch, with nothing written
``selftest``         trains a random model of two layers for ``qlora-tui doctor``

Importing ``__main__`` and ``supervisor`` does not load torch, so the run is shown as started at once.
"""
