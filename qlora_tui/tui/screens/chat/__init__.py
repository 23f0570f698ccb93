"""Chat: ``screen`` has the keys; ``conversation`` has the engine, its requests, and the turns.

``turn`` shows a prompt and its answers, ``panels`` the information around them, ``start`` the screen before
the first message. ``dialogs`` has the prompt field and the screen's dialogs, ``server_dialog`` the server for
other programs. ``saved`` writes transcripts and conversations.
"""
