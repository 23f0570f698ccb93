"""A terminal workstation for fine-tuning language models with QLoRA on one consumer GPU.

One folder, one concern; a package imports only packages above it in this list:

recipe    every setting, declared once; TOML in and out; presets
catalog   which models there are, and what their ``config.json`` says
gpu       NVML, sampled
memory    the estimate of a recipe's memory, and what fits
data      conversations from files
runs      run directories, events, queue, runner, control requests
training  the trainer process
chat      answers of base and adapter
export    merge an adapter
engine    a child process that serves the app what needs torch
demo      the whole loop on a small real model
tui       the terminal app; the only package that imports textual
cli       the commands

torch is imported only by training, chat, export and the process of the engine.
"""

__version__ = "0.2.0"
