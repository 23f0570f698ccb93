"""Data: ``screen`` shows a sample, lengths and problems.

``source_actions`` changes the sources, ``actions`` how they are read; ``row_actions`` goes from row to row
(by ``row_navigation``). ``row_loss_actions`` lists the rows by what a run learned of them
(``row_loss_list``). ``previews`` asks the engines for rows and reports; ``text`` formats rows and sources,
with the style of each token and the legend of these styles; ``token_changes`` shades tokens by what a run
learned, ``report_text`` what is known of a whole source, ``histogram`` and ``length_table`` its lengths.
``file_picker``, ``column_mapping``, ``format_picker`` and ``preference_picker`` are windows of this screen.
"""
