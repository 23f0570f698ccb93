"""The terminal app. textual is imported here and nowhere else.

app            the frame: screens, themes, keys, and the polling that every screen shares
workbench      the recipe being edited, and what follows from it (architecture, estimate)
draft          the file that the recipe is kept in, which several apps may share; draft_saving opens and saves
               the workbench with it
commands       every screen and every command, read from commands.toml; command_palette offers them; keymap
               checks the user's keymap, which qlora_tui/settings.py reads and app applies
key_names      keys inside sentences, as the user's keymap has them: [u], Enter
system_monitor polls this machine's GPU and the list of runs once a second; system_status is what it returns
               (the figures of a run on Train come from its telemetry)
leaving        what quitting says, and what it asks where deleted runs would be lost
recipe_undo    the commands undo and redo, and what they report; the history is in workbench
setting_stepper  the next value of a setting when its key is pressed
textual_compat   every use of Textual's private API, which tests/tui/test_textual_compat.py checks
terminal_app     the base of app: what is sent to the terminal, and when
screen_diff      sends only what differs from what the terminal shows
visible_lines  the text layer: no line reaches the terminal with a control character;
               monochrome and glyph_fallback are the other filters of a line
recent_paths   data and models opened by path lately, in files
themes         reads and checks the themes, in TOML files
breakpoints    widths and heights that app turns into the classes -narrow, -wide, -short and so on; the CSS of
               each screen says what it shows in them; app.tcss is the CSS that all screens share, among it
               that of panels in a small window
disk_faults    messages about a disk that cannot be written
clipboard, folders, escapes, run_notifications   what a terminal does besides showing text
gc_tuning, shutdown, stderr_capture, clock   the process: memory, its end, stderr, time

screens/       a package for each screen, and one for modals
widgets/       widgets that two screens or more share
render/        text and numbers for widgets: no widget is imported there
"""
