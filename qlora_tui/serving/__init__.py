"""An OpenAI-compatible HTTP server for a base and its adapters. Does not import torch.

model_names     the models of a server: the base, runs, their checkpoints, and aliases
requests        bodies of requests, validated and converted to requests to the engine
replies         replies of the engine, as OpenAI's objects and events
errors          errors in OpenAI's form
guest           the engine in memory: loaded on demand, unloaded when idle or for a run of the queue
app             routes, keys, limits, and waiting clients
server          the process: its socket, its API key, and its state file
"""
