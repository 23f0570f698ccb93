"""The child process for work that needs torch or transformers, and the app's client for it.

client           the app's side, asyncio, no torch
protocol         requests and replies, and the engine's log
server           the child's side, started by ``python -m qlora_tui.engine`` (chat_service, data_service)
trace_worker     runs a step on torch's meta device for the exact estimate (runs/exact_memory asks for it)
traced_model     builds the model of that step without weights: quantized, with its adapter
repeated_layers  traces a few layers of each kind, and repeats their allocations
recorder         records when each storage of that step is allocated and freed
device_kernels   makes the step choose the kernels of the run's device
"""
