"""Chat: ``screen`` has the keys; ``conversation`` the engine, its requests and the turns.

A ``turn`` shows a prompt and its answers, ``panels`` what is around them, ``dialogs`` the prompt field and
the windows of the screen. ``saved`` writes transcripts and conversations.
"""
