"""Conversations from files, and what the model will see of them.

From the outside in:

* ``open_file``, ``json_rows``, ``read``, ``row``, ``row_at``: rows out of JSON, JSONL, CSV, TSV, Parquet,
  Arrow (``arrow_rows``) and text files, plain or compressed, within ``bounds`` and under a ``memory_bound``.
  ``hub`` and ``hub_fetch``: datasets of the hub.
* ``formats`` (with ``columns``, ``chat_formats``, ``pair_formats``, ``hints``): which format rows are in, and
  conversations from them. ``preferences`` and ``chosen_side``: rows that compare or rate answers.
  ``unsupported`` and ``media``: what is recognized only to be refused. ``conversation``: what a conversation
  is. ``sources``: the recipe's sources as such files.
* ``tokenizer`` (with ``word_memo``), ``template`` (with ``template_guard``), ``traits``,
  ``stock_templates``: a model's tokenizer and chat template, without transformers. ``thinking``: how a
  template is told to think, and the reasoning of a row.
* ``spans`` (with ``thought_text``), ``render``: token ids of a conversation, and the mask of what is trained.
* ``outcome`` (with ``checks``, ``lengths``, ``near_duplicates``, ``problems``): a row by itself, rendered,
  fitted and checked; ``workers`` (with ``worker``, ``frames``) has that done on all cores. ``examine`` (with
  ``key_table``, ``long_texts``): the rows in order, counted and set beside each other. ``untrained``: tokens
  the model has never learned.
* ``dataset`` (with ``split``, ``groups``, ``store``): the tokenized set on disk that the trainer maps.
* ``inspect`` (with ``statistics``, ``thinking_facts``, ``report``): what is to be said of a file before a
  run. ``look_over``: the rows that would block it, as far as two seconds reach, and ``known_errors``: those
  an inspection has met.

Nothing here imports torch or transformers: the Data screen and the trainer share this code, so what
the screen shows is what is trained.
"""
