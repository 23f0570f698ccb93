"""Widgets that two screens or more share, each with the CSS it needs; a screen's own are in its package.

On every screen: ``top_bar``, ``recipe_strip`` and ``command_footer``.
Lists and fields: ``vi_list``, ``vi_scroll``, ``text_field``; ``line_view`` for lists that draw their lines.
``diff_widget`` repaints only cells that changed; ``graph`` builds on it.
"""
