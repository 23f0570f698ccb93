"""Chat with a model: base and adapters, from one copy of the base.

chat_types, chat_sources   sampling settings, results, and the available adapters; no torch
chat_memory                whether a chat fits into the free memory; no torch
effect                     what an adapter changes, in figures and one sentence; no torch
session                    the base model and its adapters in memory (adapters, adapter_forwards), and
                           faster decoding on a CPU (decode_attention, cpu_4bit, cpu_dequantize)
output_head                the layer that computes logits: its inputs, for comparisons of exports
logits_check               compares the first logits with those of transformers and peft alone
decode_step                faster decoding on a GPU: a step recorded as a CUDA graph
generation                 one answer, token by token (token_sampler, kv_cache, incremental_detokenizer), with
                           its thoughts separated
effect_measurement         measures an adapter on validation conversations
task_worker                what base and adapter answer to validation prompts (task_answers), in
                           a separate process
repl                       the command line's chat
"""
