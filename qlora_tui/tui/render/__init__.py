"""Text and numbers for widgets. Nothing here imports a widget of this app.

axis             round ranges, ticks and labels
series           columns of numbers, decimated to what a graph can show
plot             a graph in braille dots
block_charts     bars, columns and sparklines in block characters
recipe_line      a recipe in one line, shortened to a width for the recipe strip; names of precisions,
                 colors of verdicts
labeled          a label, a bar and a value in one line
run_labels       the sign and color of each state of a run
loss_svg         the loss of a run as an SVG picture; ``loss_png``: as PNG
summary_plot     the loss graph of a run's summary
strip_rendering  lines of text as Textual paints them
"""
