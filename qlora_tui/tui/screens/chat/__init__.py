"""Chat: ``screen``; ``actions`` is what its keys do.

``conversation_screen``, the base class of ``actions`` and ``screen``, sends requests to the engine and
receives the answers token by token. ``adapter_pair`` says which adapters answer, ``text`` formats the
header and ``side_text`` the column beside it. ``transcript`` and ``saved_conversations`` save what was
said. ``prompt_box`` is the field to type in,
``chat_turn`` shows a prompt and its answers (with ``thought_view`` and ``streaming_markdown``).
``choice_actions`` records which answer is better and how one should read (``answer_editor``).
``sampling_settings``, ``source_picker`` and ``conversation_picker`` are windows of this screen.
"""
