"""A terminal workstation for fine-tuning language models with QLoRA on one consumer GPU.

One folder, one concern; a room uses only the rooms above it in this list:

recipe    every setting, declared once; TOML in and out; presets
catalog   which models there are, and what their ``config.json`` says
gpu       NVML, sampled
memory    the estimate of a recipe's memory, and what fits
data      conversations from files
runs      run directories, events, queue, runner, control requests
training  the trainer process (torch lives here and below)
chat      talking to base and adapter
export    merge and publish an adapter
engine    a child process that serves the app what needs torch
demo      the whole loop on a small real model
tui       the terminal app (textual lives here, only here)
cli       the same verbs without the app
"""

__version__ = "0.2.0"
