"""Chat with a model: base and adapters, from one copy of the base.

chat_types          sampling settings, results, and what an adapter changes, as a sentence; no torch
chat_sources        the available adapters, and whether a chat fits into the free memory; no torch
session             the base model and its adapters in memory
adapters            loads adapters, and computes them in place of peft
decoding            keys and values of a conversation; on a GPU, a step recorded as a CUDA graph
cpu                 faster decoding on a CPU
logits              the output layer; compares the first logits with those of transformers and peft
session_check       turns off what makes a session's logits differ from the libraries'
generation          one answer, token by token, with its thoughts separated
completion_types    what programs ask for, and what they get; no torch
completion          one completion for a program: stop texts, log probabilities, echo
batches             completions of one adapter, computed together
constraints         answers that satisfy a JSON schema
effect_measurement  measures an adapter on validation conversations
decide              how probable each option is as the answer to a conversation
prediction          decisions on every row of a file, as a job
task_answers        what base and adapter answer to validation prompts, as a job
repl                the command line's chat
"""
