"""A terminal workstation for fine-tuning language models with QLoRA on one consumer GPU.

Each folder covers one concern. A package imports only packages listed before it:

recipe    every setting, declared once; reading and writing TOML; presets
catalog   the supported model families, and parsing of ``config.json``
gpu       GPU metrics from NVML
memory    memory estimates of a recipe, and the largest settings that fit
data      conversations from files
runs      run directories, events, queue, runner, control requests
training  the trainer process
chat      answers of base and adapter
export    merged models, GGUF and LoRA files, and their comparison
engine    a child process that runs what the app needs torch for
demo      the whole workflow on a small real model
tui       the terminal app; the only package that imports textual
cli       the commands

torch is imported only by training, chat, export and the engine process.
"""

__version__ = "0.2.0"
