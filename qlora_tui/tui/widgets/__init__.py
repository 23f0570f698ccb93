"""Widgets, each with the CSS it needs.

On every screen: ``top_bar``, ``recipe_strip`` and ``command_footer``.
Lists and fields: ``vi_list``, ``vi_scroll``, ``text_field``, ``prompt_box``, ``tab_bar``.
Settings: ``settings_form`` over a ``setting_list``.
Live: ``diff_widget`` repaints only cells that changed; ``graph``, ``sparklines``, ``gpu_panel`` build on it;
``log_tail`` follows lines that are appended.
Chat: ``chat_turn``, with ``thought_view`` and ``streaming_markdown``.
"""
