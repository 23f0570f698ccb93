"""Conversations from files, and their tokens as the model sees them.

From the file to the report:

* ``sources``: the recipe's sources as files with a format.
  ``read``, ``json_rows``, ``text_reader``, ``arrow_rows``: a file's rows (``row``) from JSON, JSONL, CSV,
  TSV, text, Parquet and Arrow, plain or compressed, with limits on their size.
* ``confined``: child processes with limits, in which untrusted input is processed.
* ``formats``: detects the format of rows and builds conversations (``conversation``) from them with
  ``chat_formats`` and, for rows that compare or rate answers, ``preferences``; ``formats.toml`` has the
  column names that they know. ``decisions``: whether answers are one of a few options. ``unsupported``:
  recognized formats that cannot be trained on.
* ``tokenizer`` (from ``tokenizer_files``), ``chat_template``, ``template_capabilities``: a model's tokenizer
  and chat template, without transformers. ``thought_splitter``: thoughts in a stream of text;
  ``tool_calls``: calls in an answer.
* ``assistant_spans``: which text is trained. ``samples``: token ids and loss mask within the length limit.
  ``render``: both for a conversation.
* ``row_result``: one row rendered, truncated and checked. ``dataset_scan``: all rows in order, by several
  processes, counted and compared. ``problems``: the kinds of problems in data, which ``problems.toml``
  declares.
* ``dataset`` (with ``split`` and ``store``): the tokenized data set on disk, which the trainer maps.
  ``step_plan``: the sequences and steps into which its samples are grouped. ``counted``: the stored lengths
  of the samples, from which ``step_plan`` counts the steps before a run.
* ``inspection`` (with ``dataset_report``): the report on a file before a run. ``quick_check``: a two-second
  search for rows that block a run, and how much data there is. ``excluded_rows``: rows that are left out, as
  text. ``trainable_tokens``: tokens that a model has never learned. ``repetition``: answers that repeat
  themselves or contradict each other. ``row_writers``: rows written to files. ``written_rows``:
  samples written for other trainers.

Nothing here imports torch or transformers: the Data screen and the trainer share this code, so the screen
shows exactly the tokens that are trained.
"""
