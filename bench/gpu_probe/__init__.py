"""What to know of a GPU before the first run on it: one line a question, and a JSON file.

    python -m bench.gpu_probe [--models FOLDER] [--out FILE.json] [--seconds 400] [--only QUESTION…]

About two minutes on an H100; on a CPU a dry run with a tiny model. Nothing here changes settings of the GPU.
A question that fails says so, and the next is asked; the file is written after each.

=================  ====================================================================================
machine            versions; whether the allocator grows its segments
context            GPU memory of a process beside torch's pool; whether NVML names processes; power
new_lengths        seconds of attention at each new length, with and without cuDNN first
attention_kernels  which kernels take grouped heads, with and without a mask, and their memory
varlen_attention   one flash call over a packed sequence beside one SDPA call a sample: speed and difference
triton_kernels     whether Triton's kernels compile and agree; speed of a norm, ours and torch's
four_bit           NF4 beside the CPU; speed of unpacking and of products; the same bits twice?
step_small         0.5B: speed, peak, kernels, waits, share of time at work; with checkpointing
step_small_kept    the same without checkpointing
step_large         8B with checkpointing
step_float16       0.5B in float16, as GPUs before Ampere compute
step_dora          0.5B with DoRA, whose products are peft's
out_of_memory      what torch raises on a full GPU, and whether a failure is recognized
=================  ====================================================================================

:mod:`.probe` has what a question works with, :mod:`.libraries`, :mod:`.attention` and :mod:`.steps` the
questions, :mod:`.length_timer` the program behind ``new_lengths``.
"""
