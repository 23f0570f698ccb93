"""The trainer: the process that holds torch and the GPU for one run.

``python -m qlora_tui.training RUN_DIR`` takes a run from its ``recipe.toml`` to its ``adapter/``.

``__main__``              arguments, and the environment that must be set before torch is imported
``supervisor``            one trainer per run, the heartbeat, and one event for every error (``failure``)
``reporter``              writes events, status and log; ``telemetry_recorder``: the machine once a second
``tracker``               sends events to TensorBoard, Weights & Biases, Trackio or MLflow
``attempt``               one attempt at a run: set up, train, finish; ``setup`` loads data, model and
                          adapter into the ``run``, which all else reads
``compute_device``        the GPU or CPU and the compute dtype; ``library_versions``: the libraries in use
``priority``              lowers the CPU priority of a trainer on the CPU
``base_model``            the base model with its loss and attention; ``model_loading``: quantized and frozen
``clean_files``           the files of a folder that libraries may read: weights, and configs that name no
                          code; ``kernel_publishers``: whose kernels may be loaded; ``quantized_cache``:
                          weights that were quantized earlier
``gguf_conversion``       converts a GGUF file to safetensors once, in the process ``gguf_worker``:
                          ``gguf_weights`` writes the tensors of known families, ``gguf_llama`` (with
                          ``gguf_tokenizer``) the rest of a plain Llama, ``gguf_streaming`` that of the others
``streaming``             frozen layers that wait in host memory and pass through the device
``adapter``               adds LoRA, reads and writes its weights and the final folder; ``fused``: module
                          and adapter as one autograd function; ``trainable_tokens``: trained rows of
                          embedding and head, ``trained_embeddings``: both in whole; ``experts``: 4-bit
                          experts of a mixture, and LoRA on them
``dropout``               where a model draws random numbers
``packed_attention``      several samples in one sequence, each attending only to itself, in one call of
                          ``varlen_attention`` or one by one; ``padding``: to a multiple of tokens;
                          ``length_scaled_rope``: rotary frequencies of each sample's own length
``chunked_loss``          cross-entropy without the whole logits; ``liger``: Liger's kernel in its place
``head_chunks``           the output head, a few tokens at a time, for it and for ``token_losses``
``token_losses``          the loss of each token by itself, for ``preferences``: training on pairs of answers
                          or on rated ones
``equivalence_checks``    verifies packed attention (``attention_check``: layer by layer) and the chunked
                          loss on the loaded model; ``liger`` verifies its own
``row_loss``              loss of each training row, before and after a run, in ``row_loss_worker``
``agreement``             when two tensors count as equal
``step_verification``     before training, compares loss and gradients of the first micro-batch with those of
                          transformers and peft (``step_check``), with fused layers and all other fast paths
                          on; switches off a path (``fast_paths``) that differs
``batches``               samples to sequences to micro-batches to steps, in an order that resume can repeat
``memory_meter``          peak memory beside its estimate; ``heap``: returns free memory to the system
``trainer``               one optimizer step, and the state that a checkpoint holds; ``optimizers``: which,
                          LoRA+, and the learning rate of each step; ``embedding_noise``: NEFTune
``loop``                  all steps, and between them: report, evaluate, save, handle ``control_requests``
``evaluation``            validation, and what training changed of it; ``scoring``: losses and logits without
                          training; ``answers``: greedy ones; ``forgetting``: compares with the base
``answer_comparison``     answers of base and adapter to validation prompts
``checkpoints``           their folders: written completely or not at all, old ones deleted, the newest intact
                          one found, from which ``supervisor`` resumes exactly; ``disk_errors``: the cause of
                          a failed write
``health``                what goes wrong in a step or on the GPU: warnings, and the NaN that ends a run
``distributed``           one run on several GPUs
``selftest``              trains a ``random_model`` of two layers for ``qlora-tui doctor``

``__main__``, ``supervisor`` and what they import load no torch, so the run shows as started at once.
"""
