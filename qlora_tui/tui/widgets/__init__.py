"""Widgets that two screens or more share, each with the CSS it needs; a screen's own are in its package.

``panel`` is the frame of everything on a screen. On every screen: ``top_bar`` and ``command_footer`` (the
keys that fit), and ``recipe_strip`` and ``guide`` where the recipe is edited. Lists and fields:
``vi_list``, ``vi_scroll``, ``text_field``; ``line_view`` for lists that draw their lines. ``cursor_keys``
has the keys of widgets that move a cursor themselves. ``model_problem`` replaces the content of screens
that need a model. ``diff_widget`` repaints only cells that changed; ``graph`` builds on it;
``static_update`` is for a Static.
"""
