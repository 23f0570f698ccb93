"""Text and numbers for widgets. Nothing here imports a widget of this app.

plot      axes, and graphs of lines and points
canvas    the character cells of a graph, in which curves are drawn with braille dots
meters    small charts: bars, meters, and columns of blocks
figures   a screen's few key figures, in a line or in large digits
series    series of numbers, decimated to the resolution of a graph
columns   tables of text lines: columns are declared once, and cut or left out to fit a width
labels    wording of recipes, verdicts, run states and errors, shared by all screens
loss      the loss of a run: the chart that all screens share, and its picture
picture   pictures made of a few shapes, as SVG and PNG files
run_card  the picture of a run for sharing
"""
