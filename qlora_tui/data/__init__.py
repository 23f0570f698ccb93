"""Conversations from files, and what the model will see of them.

From the outside in:

* ``text_reader``, ``json_rows``, ``read``, ``row``, ``row_index``: rows out of JSON, JSONL, CSV, TSV,
  Parquet, Arrow (``arrow_rows``) and text files, plain or compressed, within ``bounds`` and under a
  ``memory_bound``. ``hub_dataset`` and ``hub_fetch``: datasets of the Hub.
* ``formats`` (with ``column_detection``, ``chat_formats``, ``pair_formats``, ``format_hints``): which format
  rows are in, and conversations from them. ``preferences`` and ``chosen_side``: rows that compare or rate
  answers. ``unsupported`` and ``media``: what is recognized only to be rejected. ``conversation``: the
  conversation types. ``sources``: the recipe's sources as such files.
* ``tokenizer`` (with ``word_cache`` and ``tokenizer_guard``), ``chat_template`` (with ``template_guard``),
  ``template_capabilities``, ``stock_templates``: a model's tokenizer and chat template, without
  transformers. ``thinking``: how a template turns thinking on or off, and the reasoning of a row.
* ``assistant_spans`` (with ``thought_text``), ``render``: token ids of a conversation, and its loss mask.
* ``row_result`` (with ``checks``, ``truncation``, ``near_duplicates``, ``problems``): one row rendered,
  truncated and checked; ``worker_pool`` (with ``worker``, ``length_prefixed``) does that on all cores.
  ``dataset_scan`` (with ``key_table``, ``long_texts``): the rows in order, counted and compared with each
  other. ``untrained_tokens``: tokens the model has never learned, ``token_lookup``: whether
  a tokenizer has a token.
* ``dataset`` (with ``split``, ``near_duplicate_groups``, ``store``): the tokenized set on disk that the
  trainer maps.
* ``inspection`` (with ``length_stats``, ``thinking_facts``, ``dataset_report``): the report on a file before
  a run. ``quick_check``: the rows that would block a run, as many as two seconds allow, and
  ``error_cache``: the errors that an earlier inspection met.

Nothing here imports torch or transformers: the Data screen and the trainer share this code, so what
the screen shows is what is trained.
"""
