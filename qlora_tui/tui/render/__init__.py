"""Text and numbers for widgets. Nothing here imports a widget of this app.

plot     axes, graphs of lines and points, bars, columns and sparklines in block characters
figures  the few numbers that a screen is looked at for, in a line or in large digits
series   columns of numbers, decimated to what a graph can show
columns  tables of lines: columns declared once, cut and left out to fit a width
labels   how recipes, verdicts, states of runs and errors are said on every screen
loss     the loss of a run: its chart on every screen, and its picture
picture  pictures of shapes as SVG and PNG files
run_card the picture of a run to show to others
"""
