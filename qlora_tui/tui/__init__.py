"""The terminal app. textual is imported here and nowhere else.

app              the app class: screens, keys, and the polling that all screens share
workbench        the recipe being edited: its undo history, its model's architecture, its memory estimate
draft            the file with the recipe being edited, which several windows of the app may share
commands         all screens and commands, read from commands.toml; command_palette lists them
key_names        how keys are written in messages ([u], Enter); validation of the user's keymap
system_monitor   polls this machine's GPU and the list of runs once a second; system_status defines the result
setting_stepper  computes the next value of a setting when its key is pressed
terminal_app     base class of themed_app: decides what is sent to the terminal, and when; line_filters
                 rewrites lines before they are sent
textual_compat   all uses of Textual's private API; tests/tui/test_textual_compat.py checks them
themes           reads and validates the files of the folder themes, and derives a theme from the terminal's
                 own colors; themed_app, the base class of app, selects the theme to show
color_query      asks the terminal for its colors, and removes the replies from the keyboard input
breakpoints      window sizes at which app sets the CSS classes -narrow, -wide, -short and so on; app.tcss has
                 the CSS that all screens share
desktop          clipboard, window title, notifications, folders
process          garbage collection, signals, standard error, disks that cannot be written to
threads          long-running work in threads
clock            the current time
ui_state         recent paths, prompts and similar conveniences, saved in one file

screens/         a package for each screen, and a package for modals
widgets/         widgets that two or more screens share
render/          functions that format text and draw charts; they import no widgets
"""
