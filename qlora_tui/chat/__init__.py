"""Talking to a model: base against adapter, from one copy of the base.

terms, sources, effect   what is said about a chat; no torch
session                  a base in memory and the voices that speak through it (voices, lean)
                         and what answers faster on a CPU (attention, four_bit, unpack)
verify                   its first scores against those of transformers and peft alone
reply                    one answer, token by token (choose, kept, text_stream), its thoughts apart (thoughts)
measure                  what an adapter does to held-out conversations (updates, base_weights)
ask                      the command line's chat
"""
