"""An OpenAI-compatible HTTP server for a base and its adapters. Loads no torch.

model_names     which models a server has: the base, runs, their checkpoints, and aliases
requests        what a client sends, checked, as requests to the engine
replies         what the engine answers, as OpenAI's objects and events
errors          errors in OpenAI's form
guest           the engine in memory: loaded, unloaded when idle, given up to a run of the queue
app             routes, keys, limits, and the clients that wait
server          the process: its socket, its state file, and how others find, start and stop it
"""
