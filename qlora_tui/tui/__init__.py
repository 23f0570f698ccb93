"""The terminal app. textual is imported here and nowhere else.

app              the frame: screens, keys, and the polling that all screens share
workbench        the recipe being edited, with undo; architecture and estimate derived from it; and its file,
                 which several apps may share
commands         every screen and command, read from commands.toml; command_palette offers them
key_names        names of keys for sentences, from the user's keymap: [u], Enter; checks of the keymap, which
                 qlora_tui/settings.py reads and app applies
system_monitor   polls this machine's GPU and the list of runs once a second; system_status is the result
                 (the figures of a run on Train come from its telemetry)
setting_stepper  the next value of a setting when its key is pressed
terminal_app     base class of themed_app: what is sent to the terminal, and when; line_filters change lines
textual_compat   every use of Textual's private API, which tests/tui/test_textual_compat.py checks
themes           reads and checks themes from TOML files, and derives one from the terminal's own colors;
                 themed_app, the base class of app, decides which one is shown
color_query      asks the terminal for its colors, and picks the replies out of the keyboard input
breakpoints      widths and heights that app turns into the classes -narrow, -wide, -short and so on; each
                 screen's CSS says what it shows at which size; app.tcss has the CSS that all screens share
desktop          clipboard, window title, notifications, folders
process          garbage collection, signals, standard error, disks that cannot be written
threads          long-running work that a worker waits for
clock            the current time
ui_state         recent paths, prompts and the like, remembered for convenience in one file

screens/         a package for each screen, and one for modals
widgets/         widgets that two or more screens share
render/          text and numbers for widgets; it imports no widgets
"""
