"""The terminal app. textual is imported here and nowhere else.

app            the frame: screens, themes, keys, and the polling that every screen shares
workbench      the recipe being edited with undo, what follows from it (architecture, estimate), and the file
               that it is kept in, which several apps may share
commands       every screen and every command, read from commands.toml; command_palette offers them
key_names      keys inside sentences, as the user's keymap has them: [u], Enter; checks of the keymap, which
               qlora_tui/settings.py reads and app applies
system_monitor polls this machine's GPU and the list of runs once a second; system_status is what it returns
               (the figures of a run on Train come from its telemetry)
setting_stepper  the next value of a setting when its key is pressed
terminal_app   the base of app: what is sent to the terminal, and when; each line passes the line_filters
textual_compat every use of Textual's private API, which tests/tui/test_textual_compat.py checks
themes         reads and checks the themes, in TOML files; makes one of the terminal's own colors
color_query      asks the terminal for its colors, and finds its answers among the keys
breakpoints    widths and heights that app turns into the classes -narrow, -wide, -short and so on; the CSS of
               each screen says what it shows in them; app.tcss is the CSS that all screens share, among it
               that of panels in a small window
desktop        clipboard, window title, notifications, folders
process        garbage collection, signals, standard error, a disk that cannot be written; threads: long
               work that a worker waits for; clock is the time
ui_state       recent paths and prompts and other things remembered for convenience, in one file

screens/       a package for each screen, and one for modals
widgets/       widgets that two screens or more share
render/        text and numbers for widgets: no widget is imported there
"""
