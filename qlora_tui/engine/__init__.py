"""The child process that holds what needs torch or transformers, and how the app asks it.

client     the app's side, asyncio, no torch
protocol   what may be asked and answered
server     the child's side, started by ``python -m qlora_tui.engine`` (chats, previews)
trace      a training step counted on torch's meta device (meta_model); tracing starts it as a process
place      where the engine's log is
"""
