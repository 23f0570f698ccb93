"""Chat: ``screen`` and its ``commands``; ``conversation_screen``, its base, has the requests to the engine.

``adapter_pair`` says which adapters answer, ``text`` formats the header, ``transcript`` saves the
conversation. ``prompt_box`` is the field to type in, ``chat_turn`` shows a prompt and its answers (with
``thought_view`` and ``streaming_markdown``). ``sampling_settings`` and ``source_picker`` are windows of this
screen.
"""
