"""Chat with a model: base and adapters, from one copy of the base.

chat_types          sampling settings, results, and the effect of an adapter; no torch
chat_sources        the available adapters, and the memory that a chat or a run needs; no torch
session             the base model and its adapters in memory
loading             loads a session
adapters            loads adapters, and applies them without peft's overhead
decoding            keys and values of a conversation; on a GPU, decoding steps recorded as CUDA graphs
cpu                 faster decoding on a CPU
logits              the output layer; compares the first logits with those of transformers and peft
session_check       turns off features that make a session's logits differ from the libraries' logits
generation          one answer, token by token, with its thoughts separated
completion_types    completion requests from other programs, and their results; no torch
completion          one completion for a program: stop texts, log probabilities, echo
batches             completions of one adapter, computed together
constraints         answers that satisfy a JSON schema or call a function
effect_measurement  measures an adapter on validation conversations
decide              the probability of each option as the answer to a conversation
prediction          decisions on every row of a file, as a job
task_answers        answers of base and adapter to validation prompts, as a job
repl                the command line's chat
"""
