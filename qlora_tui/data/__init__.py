"""Conversations from files, and the tokens that the model sees of them.

From the file to the report:

* ``text_reader``, ``json_rows``, ``read``, ``row``, ``row_index``: rows from JSON, JSONL, CSV, TSV, Parquet,
  Arrow (``arrow_rows``) and text files, plain or compressed, within ``bounds``. ``confined``: the child
  processes with limits in which foreign input is worked on.
  ``hub_dataset``: datasets of the Hub.
* ``formats`` (with ``column_detection`` and ``format_hints``): detects the format of rows and builds
  conversations from them, ``chat_formats`` of lists of turns, ``pair_formats`` of columns for question and
  answer. ``preferences``, ``chosen_side`` and
  ``preference_samples``: rows that compare or rate answers. ``unsupported`` and ``media``: recognized formats
  that cannot be trained on. ``conversation``: the conversation types. ``sources``: the recipe's sources as
  files with a format. ``format_choices``: what each format would read of a file.
* ``tokenizer`` (with ``tokenizer_files``, ``word_cache`` and ``tokenizer_guard``), ``chat_template``,
  ``template_capabilities``, ``stock_templates``: a model's tokenizer and chat template,
  without transformers. ``thinking``: the thinking switch of a template, and the reasoning of a row.
  ``answer_decoder`` (with ``thought_splitter``): text of an answer without its thoughts.
* ``assistant_spans`` (with ``thought_text``): which text is trained, by the weights of turns that
  ``chat_formats`` reads. ``sample_tokens``: token ids, and the loss mask. ``render``: both for a
  conversation.
* ``row_result`` (with ``checks``, ``truncation``, ``near_duplicates``, ``problems``): one row rendered,
  truncated and checked; ``worker_pool`` runs this on all cores.
  ``dataset_scan`` (with ``key_table``, ``long_texts``): counts the rows in order and compares them with each
  other. ``untrained_tokens``: tokens that the model has never learned; ``token_lookup``: checks that a
  tokenizer has a token.
* ``dataset`` (with ``split``, ``near_duplicate_groups``, ``store``): the tokenized data set on disk, which
  the trainer maps.
* ``inspection`` (with ``length_stats``, ``thinking_facts``, ``dataset_report``): the report on a file before
  a run. ``quick_check``: a two-second search for rows that block a run, and how much data there is
  (``step_estimate``: as optimizer steps); ``error_cache``: the errors of
  earlier inspections. ``repetition``: whether an answer repeats itself.
  ``contradictions``: rows with nearly the same prompt and far answers.
  ``excluded_rows`` (with ``row_numbers``): rows that are left out, as text.

Nothing here imports torch or transformers: the Data screen and the trainer share this code, so what the
screen shows is what is trained.
"""
