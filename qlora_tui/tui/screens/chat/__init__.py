"""Chat: ``screen`` and its ``commands``; the ``controller`` talks to the engine.

``adapter_pair`` says which adapters answer, ``text`` formats the header, ``transcript`` saves the
conversation. ``sampling_settings`` and ``source_picker`` are windows of this screen.
"""
