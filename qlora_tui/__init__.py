"""A terminal workstation for fine-tuning language models with QLoRA on one consumer GPU.

Each folder covers one concern. A package imports only packages listed before it:

recipe    every setting, declared once; reading and writing TOML; presets
remote    another box: ssh, a copy of its runs, functions that are called there
gguf_format  how llama.cpp stores the tensors of a model, for exports to GGUF and for bases from GGUF files
catalog   models on this machine and the Hub, and parsing of ``config.json``
gpu       GPU metrics from a vendor's library, such as NVML
memory    memory estimates of a recipe, and the largest settings that fit
data      conversations from files
runs      run directories, events, queue, runner, control requests, retries
sweeps    many runs of one recipe with varied settings, and whether the best leads by more than chance
training  the trainer process
adapters  the weight updates of an adapter, and the base's weights with an adapter merged in
chat      answers of base and adapter
export    merged models and GGUF files, and their comparison
engine    a child process for work of the app that needs torch
serving   an OpenAI-compatible HTTP server, which uses an engine
demo      the whole workflow on a small real model
tui       the terminal app; the only package that imports textual
cli       the commands

Modules that every package may import:

settings       the user's ``config.toml``: theme, keymap, folders, notifications
paths          the folders of runs, presets, drafts and caches
errors         UserError with its codes, and exit codes
files          crash-safe files; checksums: folders that can be verified
publishing     writes folders as marked drafts, moves them into place, deletes them; locks: file locks
decoding       JSON that may be damaged; answer_cache: results that are cached by their inputs
hours          hours of the week, and the clock
formatting     numbers, sizes and times as text; visible: text without control characters
glossary       the terms that the app explains
installation   how packages are installed into the environment of this program
worker         runs functions of this program in separate processes; process_end: how a process ended

torch is imported only by gguf_format, training, adapters, chat, export and the engine process, and by
``gpu.torch_env`` for them.
"""

__version__ = "0.3.0"
