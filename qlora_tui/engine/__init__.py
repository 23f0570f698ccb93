"""The child process that runs what needs torch or transformers, and the client the app uses.

client           the app's side, asyncio, no torch
protocol         requests and replies, and the engine's log
server           the child's side, started by ``python -m qlora_tui.engine`` (chat_service, data_service)
trace_worker     counts the memory of a training step on torch's meta device; trace_client starts it as a job
"""
