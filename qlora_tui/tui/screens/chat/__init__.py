"""The Chat screen. ``screen`` carries out the commands; ``conversation`` owns the engine, sends requests to
it, and holds the turns.

``turn`` shows a prompt and its answers, ``panels`` the information around the turns, and ``start`` what is on
the screen before the first message, with the answers of ``recorded_answers``. ``prompt_box`` is the prompt
field. ``dialogs`` has the screen's dialogs, except the dialog in ``server_dialog``, which runs a server for
other programs. ``saved`` writes transcripts and conversations.
"""
